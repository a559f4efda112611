"""Every backend against the specification, by the signatures of kernels.backend. A further backend joins by its name in BACKENDS.

Triton runs in its interpreter where there is no GPU, one program after another, so shapes are small; it has no bf16 arithmetic.
"""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kernels import Backend, BackendName, KVFormat, KVLayout, backend_of, reference
from kernels.block_lists import BlockLists, dense, dilated, randomly, sinks, sliding_window
from kernels.kv_cells import copy_blocks, dequantize, quantize, read_cells
from tests.kernels.pools import filled_pool, random_tree, slots_of

BACKENDS = [BackendName.CPU, BackendName.TRITON]
# Batch-invariant mode shares its functions with Triton's, but for attention and products; its own tests have the rest.
every_mode = pytest.mark.parametrize("backend", list(BackendName), indirect=True)
CPU = torch.device("cpu")
# fp32 sums of the same products in another order; 16-bit weights and results are rounded.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
QUANTIZED = [form for form in KVFormat if form is not KVFormat.PLAIN]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_of(request.param)


def check_attention(
    backend: Backend,
    context_lens: list[int],
    query_lens: list[int],
    *,
    heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    value_dim: int | None = None,
    is_latent: bool = False,
    block_size: int = 16,
    form: KVFormat = KVFormat.PLAIN,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    softcap: float | None = None,
    has_sinks: bool = False,
    has_tree: bool = False,
    block_lists: list[BlockLists] | None = None,
) -> None:
    layout = KVLayout(
        num_layers=2,
        num_kv_heads=heads,
        block_size=block_size,
        head_dim=head_dim,
        value_head_dim=value_dim,
        is_latent=is_latent,
        dtype=dtype,
        format=form,
    )
    pool, tables = filled_pool(layout, context_lens, layer=1)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(sum(query_lens), heads * group, head_dim, generator=generator).to(dtype)
    sink_scores = torch.randn(heads * group, generator=generator) if has_sinks else None
    ancestors = random_tree(query_lens) if has_tree else None
    lists: dict[str, Any] = {"block_tables": tables, "query_lens": query_lens, "context_lens": context_lens, "window": window}
    plan = backend.plan_attention(
        **lists,
        layout=layout,
        num_heads=heads * group,
        device=CPU,
        plain_scores=softcap is None and sink_scores is None,
        ancestors=ancestors,
        block_lists=block_lists,
    )
    output = backend.paged_attention(query, pool, 1, plan, scale=0.2, softcap=softcap, sinks=sink_scores)
    visible = None
    if block_lists is not None:
        pairs = zip(block_lists, query_lens, context_lens, strict=True)
        visible = [
            one.mask(context_len, block_size)[:, context_len - query_len :].repeat_interleave(group, 0)
            for one, query_len, context_len in pairs
        ]
    expected, _ = reference.paged_attention(
        query, pool, layout, 1, **lists, scale=0.2, softcap=softcap, sinks=sink_scores, ancestors=ancestors, visible=visible
    )
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert (output.float() - expected.float()).abs().max() <= TOLERANCE[dtype]


# A decode batch, drafts to verify and prompts, with lengths on all sides of the blocks' edges.
CONTEXTS, QUERIES = [1, 15, 16, 17, 33, 60, 3, 16, 47, 90], [1, 1, 1, 1, 1, 4, 2, 16, 30, 64]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 40])
def test_attention_on_a_ragged_batch(backend: Backend, dtype: torch.dtype, window: int | None) -> None:
    check_attention(backend, CONTEXTS, QUERIES, window=window, dtype=dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("form", list(KVFormat))
@pytest.mark.parametrize("head_dim", [32, 80])
def test_attention_over_every_format(backend: Backend, form: KVFormat, head_dim: int, dtype: torch.dtype) -> None:
    check_attention(backend, [33, 60, 47], [1, 4, 30], form=form, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize(
    ("head_dim", "group"), [(64, 1), (80, 3), (96, 8), (128, 16), (256, 1), (64, 16), (80, 8), (96, 1), (128, 3), (256, 8)]
)
def test_attention_for_heads_of_every_size_and_grouping(backend: Backend, head_dim: int, group: int) -> None:
    check_attention(backend, [40, 37, 35], [1, 3, 20], heads=1, group=group, head_dim=head_dim)


@pytest.mark.parametrize(("heads", "block_size"), [(1, 64), (3, 32)])
def test_attention_over_blocks_of_every_size(backend: Backend, heads: int, block_size: int) -> None:
    check_attention(backend, [63, 64, 65, 130, 70], [1, 1, 1, 2, 66], heads=heads, block_size=block_size)


@every_mode
@pytest.mark.parametrize("window", [None, 20])
def test_attention_with_capped_scores_and_sinks(backend: Backend, window: int | None) -> None:
    check_attention(backend, [40, 1, 37, 35], [1, 1, 3, 20], softcap=1.5, window=window)
    check_attention(backend, [40, 1, 37, 35], [1, 1, 3, 20], has_sinks=True, window=window)
    check_attention(backend, [40, 1, 37, 35], [1, 1, 3, 20], has_sinks=True, softcap=1.5, form=KVFormat.INT8, window=window)


@every_mode
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("group", [2, 12])
def test_attention_of_a_tree_of_drafts(backend: Backend, window: int | None, group: int) -> None:
    check_attention(backend, [20, 16, 40, 1, 70], [5, 16, 2, 1, 9], has_tree=True, window=window, group=group)


@every_mode
@pytest.mark.parametrize("group", [4, 16])
def test_attention_over_latents(backend: Backend, group: int) -> None:
    check_attention(backend, [40, 1, 37, 35], [1, 1, 3, 20], heads=1, group=group, head_dim=48, value_dim=32, is_latent=True)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(48, 32), (32, 48)])
def test_attention_when_values_are_not_as_wide_as_keys(backend: Backend, head_dim: int, value_dim: int, window: int | None) -> None:
    check_attention(backend, [40, 1, 37, 35], [1, 1, 3, 20], head_dim=head_dim, value_dim=value_dim, window=window)


@pytest.mark.parametrize("pattern", ["dense", "longformer", "bigbird", "longnet"])
@pytest.mark.parametrize("group", [1, 4])
def test_attention_by_lists_of_blocks(backend: Backend, pattern: str, group: int) -> None:
    context_lens, query_lens = [100, 75, 16], [100, 40, 7]

    def lists(context_len: int) -> BlockLists:
        size = (-(-context_len // 16), 2)
        match pattern:
            case "longformer":
                return sliding_window(*size, width=2) | sinks(*size, count=1)
            case "bigbird":
                return sliding_window(*size, width=1) | sinks(*size, count=1) | randomly(*size, count=1, seed=3)
            case "longnet":
                return dilated(*size, segment=4, rate=2)
        return dense(*size)

    check_attention(backend, context_lens, query_lens, group=group, block_lists=[lists(length) for length in context_lens])


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4),
    heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 5, 16]),
    head_dim=st.sampled_from([16, 40]),
    form=st.sampled_from(KVFormat),
    window=st.none() | st.integers(1, 80),
    softcap=st.none() | st.just(2.0),
    has_sinks=st.booleans(),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_on_any_shape(
    name: BackendName,
    lengths: list[tuple[int, int]],
    heads: int,
    group: int,
    head_dim: int,
    form: KVFormat,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
) -> None:
    pairs = sorted(((max(pair), min(pair)) for pair in lengths), key=lambda pair: pair[1])  # fewest new tokens first
    check_attention(
        backend_of(name),
        [context for context, _ in pairs],
        [query for _, query in pairs],
        heads=heads,
        group=group,
        head_dim=head_dim,
        form=form,
        window=window,
        softcap=softcap,
        has_sinks=has_sinks,
    )


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("query_len", [1, 20])
@pytest.mark.parametrize("form", list(KVFormat))
def test_attention_when_a_visible_cell_is_nan_says_so(backend: Backend, form: KVFormat, query_len: int, half: int) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=1, block_size=16, head_dim=16, dtype=torch.float32, format=form)
    pool, tables = filled_pool(layout, [40], layer=0)
    if form is KVFormat.PLAIN:
        pool[tables[0][0], 0, 0, 3, 16 * half] = float("nan")
    else:
        layout.scales(pool)[tables[0][0], 0, 0, 3, half] = float("nan")
    plan = backend.plan_attention(block_tables=tables, query_lens=[query_len], context_lens=[40], layout=layout, num_heads=1, device=CPU)
    assert backend.paged_attention(torch.randn(query_len, 1, 16), pool, 0, plan, scale=1.0).isnan().any(-1).all()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_tokens=st.integers(1, 20),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    half_dim=st.sampled_from([8, 20, 32]),
    form=st.sampled_from(KVFormat),
    has_norm=st.booleans(),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_rope_and_write_kv(
    name: BackendName, seed: int, num_tokens: int, kv_heads: int, group: int, half_dim: int, form: KVFormat, has_norm: bool
) -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=kv_heads, block_size=16, head_dim=2 * half_dim, dtype=torch.float32, format=form)
    generator = torch.Generator().manual_seed(seed)
    pool = layout.allocate(3, CPU)
    pool.view(torch.uint8).random_(0, 100, generator=generator)
    expected_pool = pool.clone()
    qkv = torch.randn(num_tokens, kv_heads * (group + 2), 2 * half_dim, generator=generator)
    angles = torch.randn(50, half_dim, generator=generator) * 3.0
    arguments: dict[str, Any] = {
        "positions": torch.randint(50, (num_tokens,), generator=generator),
        "slots": torch.randperm(3 * 16, generator=generator)[:num_tokens],
        "cos": angles.cos(),
        "sin": angles.sin(),
        "query_norm": torch.rand(2 * half_dim, generator=generator) + 0.5 if has_norm else None,
        "key_norm": torch.rand(2 * half_dim, generator=generator) + 0.5 if has_norm else None,
        "eps": 1e-6,
    }
    query = backend_of(name).rope_and_write_kv(qkv, pool, layout, 1, **arguments)
    expected = reference.rope_and_write_kv(qkv, expected_pool, layout, 1, **arguments)
    assert torch.allclose(query, expected, rtol=1e-5, atol=1e-5)
    every = list(range(3))
    for numbers, wanted in zip(read_cells(pool, layout, 1, every), read_cells(expected_pool, layout, 1, every), strict=True):
        # A number on the edge between two quantized ones may fall to either side.
        step = 0.0 if form is KVFormat.PLAIN else wanted[wanted.isfinite()].abs().max().item() / {1: 14, 2: 120, 3: 6}[form.value]
        assert torch.isclose(numbers, wanted, rtol=1e-5, atol=1e-5 + step, equal_nan=True).all()
    untouched = torch.ones(3 * 16, dtype=torch.bool)
    untouched[arguments["slots"]] = False
    if form is KVFormat.PLAIN:
        cells, expected_cells = (one.view(torch.int32).transpose(1, 3).reshape(48, -1) for one in (pool, expected_pool))
        assert torch.equal(cells[untouched], expected_cells[untouched])


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_tokens=st.integers(1, 20),
    heads=st.integers(1, 3),
    rank=st.sampled_from([16, 24]),
    half_dim=st.sampled_from([4, 5]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_rope_and_write_latent(
    name: BackendName, seed: int, num_tokens: int, heads: int, rank: int, half_dim: int, dtype: torch.dtype
) -> None:
    layout = KVLayout(
        num_layers=2,
        num_kv_heads=1,
        block_size=16,
        head_dim=rank + 2 * half_dim,
        value_head_dim=rank,
        is_latent=True,
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(3, *layout.block_shape, generator=generator).to(dtype)
    query = torch.randn(num_tokens, heads, 12 + 2 * half_dim, generator=generator).to(dtype)
    cell = torch.randn(num_tokens, layout.head_dim, generator=generator).to(dtype)
    angles = torch.randn(50, half_dim, generator=generator) * 3.0
    arguments: dict[str, Any] = {
        "positions": torch.randint(50, (num_tokens,), generator=generator),
        "slots": torch.randperm(3 * 16, generator=generator)[:num_tokens],
        "cos": angles.cos(),
        "sin": angles.sin(),
        "norm": (torch.rand(rank, generator=generator) + 0.5).to(dtype),
        "eps": 1e-2,
    }
    found, expected = (query.clone(), pool.clone()), (query.clone(), pool.clone())
    backend_of(name).rope_and_write_latent(found[0], cell, found[1], layout, 1, **arguments)
    reference.rope_and_write_latent(expected[0], cell, expected[1], layout, 1, **arguments)
    # Once rounded numbers near a tie may fall to either side.
    tolerance = 1e-5 if dtype is torch.float32 else 2e-3
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)
    assert torch.equal(found[0][..., :12], query[..., :12])
    untouched = torch.ones(2, 3 * 16, dtype=torch.bool)
    untouched[1, arguments["slots"]] = False
    cells, before = (one.transpose(0, 1).reshape(2, 48, -1) for one in (found[1], pool))
    assert torch.equal(cells[untouched], before[untouched])


@pytest.mark.parametrize("form", QUANTIZED)
def test_quantized_cells_are_the_specification_s_bit_for_bit(backend: Backend, form: KVFormat) -> None:
    """Without a norm or a rotation there is nothing to round but the numbers."""
    layout = KVLayout(num_layers=1, num_kv_heads=2, block_size=16, head_dim=32, dtype=torch.float32, format=form)
    magnitudes = torch.logspace(-9, 4, 60)[:, None, None]
    qkv = torch.randn(60, 6, 32, generator=torch.Generator().manual_seed(2)) * magnitudes
    qkv[7], qkv[8, :, 5:] = 0.0, 0.0
    # Ties, with scales of exactly one: between two fp8 numbers at several magnitudes, and between whole ones.
    qkv[9] = torch.cat(
        (torch.tensor([448.0]), torch.arange(17.0, 32.0, 2.0), torch.arange(-34.0, -64.0, -4.0), torch.arange(15.0) * 2.0**-10)
    )
    qkv[10] = torch.cat((torch.tensor([127.0]), torch.arange(31.0) - 15.5))
    qkv[11] = torch.cat((torch.tensor([7.0]), torch.arange(31.0) % 13 - 6.5))
    expected_pool, pool = layout.allocate(4, CPU), layout.allocate(4, CPU)
    arguments: dict[str, Any] = {
        "positions": torch.zeros(60, dtype=torch.int64),
        "slots": torch.arange(60),
        "cos": torch.ones(1, 16),
        "sin": torch.zeros(1, 16),
    }
    reference.rope_and_write_kv(qkv, expected_pool, layout, 0, **arguments)
    backend.rope_and_write_kv(qkv, pool, layout, 0, **arguments)
    assert torch.equal(pool, expected_pool)


@pytest.mark.parametrize("form", QUANTIZED)
def test_quantized_numbers_are_near_what_they_were(form: KVFormat) -> None:
    numbers = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    error = (dequantize(*quantize(numbers, form), form) - numbers).abs()
    largest = numbers.abs().amax(-1, keepdim=True)
    if form is KVFormat.FP8:
        assert (error <= numbers.abs() * 2.0**-4 + largest * 2.0**-9 / 448 + 1e-6).all()
    else:
        assert (error <= largest * 0.501 / {KVFormat.INT8: 127, KVFormat.INT4: 7}[form]).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), num_tokens=st.integers(1, 5), width=st.integers(1, 130))
@pytest.mark.parametrize("name", BACKENDS)
def test_norms_and_activation(name: BackendName, seed: int, num_tokens: int, width: int) -> None:
    backend, generator = backend_of(name), torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(num_tokens, width, generator=generator) for _ in range(2))
    weight, gate_up = torch.randn(width, generator=generator), torch.randn(num_tokens, 2 * width, generator=generator)
    expected_residual = residual.clone()
    assert torch.allclose(backend.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)
    output = backend.add_rms_norm(residual, x, weight, 1e-5)
    assert torch.allclose(output, reference.add_rms_norm(expected_residual, x, weight, 1e-5), rtol=1e-5, atol=1e-6)
    assert torch.equal(residual, expected_residual)
    for activation in ("silu", "gelu_tanh"):
        expected = reference.activate_and_mul(gate_up, activation)
        assert torch.allclose(backend.activate_and_mul(gate_up, activation), expected, rtol=1e-5, atol=1e-6)


@every_mode
def test_batched_products_of_rows_and_weights_that_are_parts_of_larger_ones(backend: Backend) -> None:
    query, up = torch.randn(7, 3, 40), torch.randn(3, 24, 50)
    x, weight = query[..., :24].transpose(0, 1), up.transpose(1, 2)
    assert torch.allclose(backend.batched_linear(x, weight), torch.einsum("bmk,bkn->bmn", x, up), atol=1e-5)


@pytest.mark.parametrize("source_form", list(KVFormat))
@pytest.mark.parametrize("target_form", list(KVFormat))
def test_copied_blocks_are_the_specification_s_bit_for_bit(backend: Backend, source_form: KVFormat, target_form: KVFormat) -> None:
    shape: dict[str, Any] = {"num_layers": 2, "block_size": 16, "head_dim": 24, "dtype": torch.float32}
    source_layout = KVLayout(num_kv_heads=3, format=source_form, **shape)
    wire_layout = KVLayout(num_kv_heads=2, format=target_form, **shape)
    source, _ = filled_pool(source_layout, [100, 60], layer=0)
    second, _ = filled_pool(source_layout, [100, 60], layer=1, seed=5)
    source[:, 1] = second[:, 1]
    blocks = torch.tensor([4, 0, 7], dtype=torch.int32)
    packed, expected = wire_layout.allocate(3, CPU), wire_layout.allocate(3, CPU)
    arguments: dict[str, Any] = {"source_blocks": blocks, "first_source_head": 1, "num_heads": 2}
    backend.copy_blocks(source, source_layout, packed, wire_layout, **arguments)
    copy_blocks(source, source_layout, expected, wire_layout, **arguments)
    assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))
    back, expected = source_layout.allocate(9, CPU), source_layout.allocate(9, CPU)
    arguments = {"target_blocks": blocks, "first_target_head": 1}
    backend.copy_blocks(packed, wire_layout, back, source_layout, **arguments)
    copy_blocks(packed, wire_layout, expected, source_layout, **arguments)
    assert torch.equal(back.view(torch.uint8), expected.view(torch.uint8))
    if source_form is target_form:
        assert torch.equal(back[blocks.long(), :, 1:].view(torch.uint8), source[blocks.long(), :, 1:].view(torch.uint8))


def test_written_cells_are_read_again() -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=2, block_size=16, head_dim=8, dtype=torch.float32)
    pool, tables = filled_pool(layout, [20], layer=0)
    keys, values = read_cells(pool, layout, 0, tables[0])
    cells = pool[:, 0].transpose(1, 2).flatten(0, 1)[slots_of(tables[0], 20, 16)]
    assert torch.equal(torch.cat((keys, values), -1)[:, :20], cells.transpose(0, 1))
