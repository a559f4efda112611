"""Batch-invariant mode: a token's bits are the same however its prompt is cut, whatever it is batched with, on how many programs."""

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kernels import KVFormat, KVLayout, reference, triton_backend, triton_shapes
from kernels import triton_attention as attention
from kernels import triton_invariant as backend
from kernels.triton_linear import linear
from tests.kernels.pools import filled_pool

pytestmark = pytest.mark.usefixtures("even_products", "short_parts")
CPU = torch.device("cpu")
HEADS = 4
PLAIN = KVLayout(num_layers=1, num_kv_heads=2, block_size=16, head_dim=16, dtype=torch.float32)
LATENT = KVLayout(num_layers=1, num_kv_heads=1, block_size=16, head_dim=48, value_head_dim=32, is_latent=True, dtype=torch.float32)
INT8 = KVLayout(num_layers=1, num_kv_heads=2, block_size=16, head_dim=16, dtype=torch.float32, format=KVFormat.INT8)


def plan(tables: list[list[int]], query_lens: list[int], context_lens: list[int], layout: KVLayout = PLAIN, **more: Any) -> Any:
    return backend.plan_attention(
        block_tables=tables, query_lens=query_lens, context_lens=context_lens, layout=layout, num_heads=HEADS, device=CPU, **more
    )


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 tokens, so that few have several."""
    monkeypatch.setattr(attention, "INVARIANT_CHUNK", 4)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets how many programs a launch has."""

    def set_to(number: int) -> None:
        monkeypatch.setattr(triton_shapes, "INTERPRETED_PROGRAMS", number)
        triton_shapes.num_programs.cache_clear()

    yield set_to
    triton_shapes.num_programs.cache_clear()


def test_sequence_has_the_same_bits_alone_and_in_any_batch(programs: Any) -> None:
    context_lens = [170, 1, 64, 16, 230]
    pool, tables = filled_pool(PLAIN, context_lens, layer=0)
    query = torch.randn(5, HEADS, 16)

    def attend(rows: list[int], module: Any = backend) -> torch.Tensor:
        lists = {"block_tables": [tables[row] for row in rows], "context_lens": [context_lens[row] for row in rows]}
        planned = module.plan_attention(**lists, query_lens=[1] * len(rows), layout=PLAIN, num_heads=HEADS, device=CPU)
        attended: torch.Tensor = module.paged_attention(query[rows], pool, 0, planned, scale=0.3)
        return attended

    together = attend([0, 1, 2, 3, 4])
    alone = torch.cat([attend([row]) for row in range(5)])
    assert torch.equal(together, alone)
    assert torch.equal(together.flip(0), attend([4, 3, 2, 1, 0]))
    programs(3)
    assert torch.equal(together, attend([0, 1, 2, 3, 4]))
    # What makes it worth a mode: other pieces give other sums.
    assert not torch.equal(attend([0, 4], triton_backend), attend([0, 1, 2, 3, 4], triton_backend)[[0, 4]])


@pytest.mark.parametrize(("layout", "window"), [(PLAIN, None), (PLAIN, 40), (PLAIN, 90), (INT8, None), (LATENT, None)])
def test_tokens_have_the_same_bits_however_their_prompt_is_cut(
    layout: KVLayout, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    length, other_length = 120, 75
    pool, (table, other) = filled_pool(layout, [length, other_length], layer=0)
    query, other_query = torch.randn(length, HEADS, layout.head_dim), torch.randn(1, HEADS, layout.head_dim)

    def attend(start: int, end: int) -> torch.Tensor:
        """Tokens start … end - 1 of the prompt, beside a token of another sequence."""
        first = 0 if window is None else max(start - window + 1, 0) // 16  # what is before it need not be there any more
        planned = plan([other, table[first:]], [1, end - start], [other_length, end - first * 16], layout, window=window)
        rows = torch.cat((other_query, query[start:end]))
        return backend.paged_attention(rows, pool, 0, planned, scale=0.3)[1:]

    whole = attend(0, length)
    expected, _ = reference.paged_attention(
        query, pool, layout, 0, block_tables=[table], query_lens=[length], context_lens=[length], scale=0.3, window=window
    )
    assert torch.allclose(whole, expected, atol=2e-5)
    for start, end in ((0, 50), (50, 68), (68, 120), (63, 64), (107, 120)):
        assert torch.equal(attend(start, end), whole[start:end]), f"tokens {start} to {end}"
    monkeypatch.setattr(backend, "PARTS_BYTES", 1 << 13)
    assert len(plan([table], [length], [length], layout, window=window).parts) > 1
    assert torch.equal(attend(0, length), whole)


def test_single_tokens_are_launched_by_themselves_and_rows_follow_each_other() -> None:
    query_lens, context_lens = [1, 1, 1, 700, 30], [40, 700, 3, 900, 30]
    tables = [list(range(-(-length // 16))) for length in context_lens]
    parts = plan(tables, query_lens, context_lens).parts
    assert [part.most_query for part in parts] == [1, 16]
    assert [part.num_tokens for part in parts] == [3, 730]
    assert [part.first_row for part in parts] == [0, 3]
    assert plan([[]], [0], [0]).parts == []


@pytest.mark.parametrize("layout", [PLAIN, LATENT])
def test_launches_leave_no_more_parts_than_there_is_room_for(layout: KVLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "PARTS_BYTES", 1 << 19)
    query_lens, context_lens = [1] * 80 + [900, 2], [1500] * 80 + [2000, 64]
    parts = plan([[0] * 130] * 82, query_lens, context_lens, layout).parts  # tables are longer than their contexts
    assert len(parts) > 3 and parts[0].most_query == parts[1].most_query == 1
    for part in parts:
        sequences, width = part.block_tables.shape
        room = attention.parts_room(sequences, part.most_query, width, layout, HEADS, CPU, invariant=True)
        assert room.num_bytes <= 1 << 19


def test_workspace_when_it_grows_keeps_no_more_of_outgrown_memory_than_it_uses() -> None:
    memory = attention.Workspace(CPU)
    for number in range(1, 60):
        room = attention.parts_room(number, 1, 40, PLAIN, HEADS, CPU, invariant=True)
        parts, sums, arrived = memory.take(room)
        assert parts.numel() * 4 >= room.num_bytes and sums.numel() >= 2 * room.num_slots * room.rows and len(arrived) >= room.num_pairs
    assert sum(tensor.nbytes for tensor in memory._outgrown) < sum(tensor.nbytes for tensor in (parts, sums, arrived))


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=4), st.none() | st.integers(1, 100))
def test_tokens_of_a_run_have_the_same_blocks_to_mask(lengths: list[tuple[int, int]], window: int | None) -> None:
    query_lens, context_lens = [query for _, query in lengths], [prefix + query for prefix, query in lengths]
    tables = [[index] * 26 for index in range(len(lengths))]
    tokens = []
    runs = backend.invariant_runs(block_tables=tables, query_lens=query_lens, context_lens=context_lens, block_size=16, window=window)
    for run in runs:
        assert len(run.block_table) * 16 >= run.context_len
        seen = range(run.context_len - run.query_len, run.context_len)
        assert len({token // 16 for token in seen}) == 1
        assert window is None or len({max(token - window + 1, 0) // 16 for token in seen}) == 1
        tokens += [(run.block_table[0], token) for token in seen]
    assert tokens == [(index, prefix + token) for index, (prefix, query) in enumerate(lengths) for token in range(query)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_rows", "in_features", "out_features"), [(1, 64, 64), (70, 100, 130), (600, 33, 65)])
def test_product_is_that_of_pytorch_and_a_row_s_bits_its_own(
    dtype: torch.dtype, num_rows: int, in_features: int, out_features: int
) -> None:
    x, weight = torch.randn(num_rows, in_features).to(dtype), torch.randn(out_features, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype)
    product = linear(x, weight, bias, torch.float32)
    assert torch.allclose(product, x.float() @ weight.float().T + bias.float(), atol=1e-4)
    for start, end in ((0, 1), (num_rows - 1, num_rows), (num_rows // 2, num_rows)):
        assert torch.equal(linear(x[start:end], weight, bias, torch.float32), product[start:end])
    assert linear(x, weight).dtype == dtype
    assert linear(x[:0], weight).shape == (0, out_features)
