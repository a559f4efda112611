"""What only the Triton kernels promise: log sums that merge, equal pieces of work."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import KVLayout, reference, triton_invariant, triton_shapes
from kernels import triton_attention as attention
from kernels import triton_backend as backend
from tests.kernels.pools import filled_pool, random_tree

CPU = torch.device("cpu")
LAYOUT = KVLayout(num_layers=1, num_kv_heads=2, block_size=16, head_dim=16, dtype=torch.float32)


def plan(
    tables: list[list[int]], query_lens: list[int], context_lens: list[int], *, invariant: bool = False, **more: Any
) -> backend.TritonPlan:
    plan_attention = triton_invariant.plan_attention if invariant else backend.plan_attention
    return plan_attention(
        block_tables=tables, query_lens=query_lens, context_lens=context_lens, layout=LAYOUT, num_heads=4, device=CPU, **more
    )


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_log_sums_are_the_specification_s(window: int | None, has_sinks: bool) -> None:
    context_lens, query_lens = [1, 40, 100, 50], [1, 1, 4, 30]
    pool, tables = filled_pool(LAYOUT, context_lens, layer=0)
    query, sinks = torch.randn(36, 4, 16), torch.randn(4) if has_sinks else None
    planned = plan(tables, query_lens, context_lens, window=window)
    output, log_sums = backend.attention_with_log_sums(query, pool, 0, planned, scale=0.3, sinks=sinks)
    lists: dict[str, Any] = {"block_tables": tables, "query_lens": query_lens, "context_lens": context_lens, "window": window}
    expected, expected_sums = reference.paged_attention(query, pool, LAYOUT, 0, **lists, scale=0.3, sinks=sinks)
    assert torch.allclose(output, expected, atol=2e-5)
    assert torch.allclose(log_sums, expected_sums, atol=2e-5)


def test_parts_of_a_context_merge_to_what_the_whole_gives() -> None:
    pool, tables = filled_pool(LAYOUT, [96], layer=0)
    query = torch.randn(1, 4, 16)
    parts = [tables[0][:2], tables[0][2:5], tables[0][5:]]
    found = [backend.attention_with_log_sums(query, pool, 0, plan([part], [1], [16 * len(part)]), scale=0.3) for part in parts]
    nothing = (torch.zeros(1, 4, 16), torch.full((1, 4), float("-inf")))
    outputs, log_sums = (torch.stack(list(column)) for column in zip(*found, nothing, strict=True))
    whole, whole_sums = backend.attention_with_log_sums(query, pool, 0, plan(tables, [1], [96]), scale=0.3)
    for merged, merged_sums in (
        backend.merge_attention(outputs, log_sums),
        reference.merge_attention(list(outputs), list(log_sums)),
    ):
        assert torch.allclose(merged, whole, atol=1e-5)
        assert torch.allclose(merged_sums, whole_sums, atol=1e-5)


# 64 rows are the most that a tile has, and of two bytes a number alone: two tiles, one, and one that is not full.
@pytest.mark.parametrize(("num_heads", "query_lens"), [(128, [1, 1, 1, 0]), (16, [4, 1, 2, 4]), (16, [3, 1, 0, 2])])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("has_tree", [False, True])
def test_latents_by_large_tiles(num_heads: int, query_lens: list[int], window: int | None, invariant: bool, has_tree: bool) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=1, block_size=16, head_dim=48, value_head_dim=32, is_latent=True, dtype=torch.float16)
    assert triton_shapes.tile_rows(num_heads * max(query_lens), layout, triton_shapes.capability(CPU)) == 64
    context_lens = [300, 1, 37, 64]
    pool, tables = filled_pool(layout, context_lens, layer=0)
    query = torch.randn(sum(query_lens), num_heads, 48, generator=torch.Generator().manual_seed(1)).half()
    lists: dict[str, Any] = {"block_tables": tables, "query_lens": query_lens, "context_lens": context_lens, "window": window}
    ancestors = random_tree(query_lens) if has_tree else None
    plan_attention = triton_invariant.plan_attention if invariant else backend.plan_attention
    planned = plan_attention(**lists, layout=layout, num_heads=num_heads, device=CPU, ancestors=ancestors)
    output, log_sums = backend.attention_with_log_sums(query, pool, 0, planned, scale=0.2)
    expected, expected_sums = reference.paged_attention(query, pool, layout, 0, **lists, scale=0.2, ancestors=ancestors)
    assert torch.allclose(output, expected, atol=2e-3)
    assert torch.allclose(log_sums, expected_sums, atol=1e-3)


def test_merge_of_parts_that_all_saw_nothing_is_nothing() -> None:
    outputs, log_sums = torch.zeros(2, 3, 4, 16), torch.full((2, 3, 4), float("-inf"))
    merged, merged_sums = backend.merge_attention(outputs, log_sums)
    assert not merged.any()
    assert (merged_sums == float("-inf")).all()


@pytest.mark.parametrize("invariant", [False, True])
def test_counters_are_zero_again_and_rows_of_others_untouched(invariant: bool) -> None:
    context_lens = [300, 0, 17, 600]
    pool, tables = filled_pool(LAYOUT, context_lens, layer=0)
    query = torch.randn(3, 4, 16)
    (planned,) = plan(tables, [1, 0, 1, 1], context_lens, invariant=invariant).parts
    assert isinstance(planned, attention.DecodePlan)
    output, log_sums = torch.full((5, 4, 16), 7.0), torch.full((5, 4), 7.0)
    for _ in range(2):
        attention.run_decode(query, pool, 0, planned, scale=0.3, output=output[:3], log_sums=log_sums[:3])
        arrived = attention.workspace(CPU).take(attention.parts_room(1, 1, 1, LAYOUT, 4, CPU, invariant=False))[2]
        assert len(arrived) and not arrived.any()
    assert (output[3:] == 7.0).all() and (log_sums[3:] == 7.0).all()
    rest = [0, 2, 3]
    expected, _ = reference.paged_attention(
        query,
        pool,
        LAYOUT,
        0,
        block_tables=[tables[row] for row in rest],
        query_lens=[1, 1, 1],
        context_lens=[context_lens[row] for row in rest],
        scale=0.3,
    )
    assert torch.allclose(output[:3], expected, atol=2e-5)


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 16)), min_size=1, max_size=9),
    st.none() | st.integers(1, 200),
    st.booleans(),
)
def test_units_are_laid_out_one_sequence_after_another(lengths: list[tuple[int, int]], window: int | None, invariant: bool) -> None:
    lengths = [(max(context, query), query) for context, query in lengths]
    planned = attention.plan_decode(
        block_tables=[[0]] * len(lengths),
        query_lens=[query for _, query in lengths],
        context_lens=[context for context, _ in lengths],
        layout=LAYOUT,
        num_heads=4,
        device=CPU,
        window=window,
        invariant=invariant,
    )
    expected = [0]
    tiles = max(1, -(-2 * max(query for _, query in lengths) // 32))
    for context, query in lengths:
        first = 0 if window is None else max(context - query - window + 1, 0) // 16
        blocks = -(-context // 16) - first if query else 0
        units = -(-blocks // attention.INVARIANT_CHUNK) if invariant else blocks
        expected.append(expected[-1] + units * 2 * tiles)
    assert planned.starts.tolist() == expected
