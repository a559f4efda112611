"""Paged attention on the CPU against its specification: ragged lengths, block edges, windows, every head grouping."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import kernels
from kernels import reference
from kernels.kv_layout import KVLayout

# fp32 sums of the same products in another order; bf16 rounds queries' products to 8 bits twice.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def scattered_pool(layout: KVLayout, context_lens: list[int], *, dense: bool) -> tuple[torch.Tensor, list[list[int]]]:
    """A pool of noise with one table per sequence: blocks in order when dense, shuffled among strangers' blocks otherwise."""
    counts = [-(-context_len // layout.block_size) for context_len in context_lens]
    total = sum(counts) if dense else 4 * sum(counts) + 3
    pool = torch.randn(total, *layout.block_shape).to(layout.dtype)
    order = torch.arange(total) if dense else torch.randperm(total)
    tables, start = [], 0
    for count in counts:
        tables.append(order[start : start + count].tolist())
        start += count
    return pool, tables


def check_attention(
    context_lens: list[int],
    query_lens: list[int],
    *,
    heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    window: int | None = None,
    dense: bool = True,
    dtype: torch.dtype = torch.float32,
    shared_table: bool = False,
) -> kernels.AttentionPlan:
    layout = KVLayout(num_layers=3, num_kv_heads=heads, block_size=block_size, head_dim=head_dim, dtype=dtype)
    pool, tables = scattered_pool(layout, context_lens, dense=dense)
    if shared_table:
        tables = [tables[0]] * len(tables)
    query = torch.randn(sum(query_lens), heads * group, head_dim).to(dtype)
    plan = kernels.plan_attention(block_tables=tables, query_lens=query_lens, context_lens=context_lens, layout=layout, window=window)
    output = kernels.paged_attention(query, pool, 1, plan, scale=0.3)
    expected = reference.paged_attention(
        query, pool, 1, block_tables=tables, query_lens=query_lens, context_lens=context_lens, scale=0.3, window=window
    )
    assert output.isfinite().all()
    assert (output.float() - expected.float()).abs().max() <= TOLERANCE[dtype]
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 40])
def test_paged_attention_on_a_mixed_ragged_batch_equals_the_reference(dtype: torch.dtype, dense: bool, window: int | None) -> None:
    plan = check_attention(
        [1, 15, 16, 17, 33, 100, 3, 16, 47, 90], [1, 1, 1, 1, 1, 1, 2, 16, 30, 64],
        window=window, dense=dense, dtype=dtype,
    )  # fmt: skip
    assert plan.decode is not None and len(plan.prefills) == 4
    if window is None:
        assert (plan.decode.pool_range is not None) == dense


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=6),
    heads=st.integers(1, 4),
    group=st.sampled_from([1, 2, 3, 8, 16]),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    block_size=st.sampled_from([16, 32, 64]),
    window=st.one_of(st.none(), st.integers(1, 100)),
    dense=st.booleans(),
)
def test_paged_attention_on_any_shape_equals_the_reference(
    lengths: list[tuple[int, int]], heads: int, group: int, head_dim: int, block_size: int, window: int | None, dense: bool
) -> None:
    pairs = sorted(((max(pair), min(pair)) for pair in lengths), key=lambda pair: pair[1] != 1)  # decodes first
    check_attention(
        [context for context, _ in pairs],
        [query for _, query in pairs],
        heads=heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        window=window,
        dense=dense,
    )


def test_decode_attention_when_sequences_share_blocks_gathers_them() -> None:
    plan = check_attention([40, 40, 40], [1, 1, 1], shared_table=True)
    assert plan.decode is not None and plan.decode.pool_range is None


def test_write_kv_when_read_back_equals_the_reference() -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=2, block_size=16, head_dim=8, dtype=torch.float32)
    pools = [layout.allocate(5, torch.device("cpu")) for _ in range(2)]
    key, value = torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    slots = torch.randperm(5 * 16)[:7]
    kernels.write_kv(pools[0], 2, key, value, kernels.kv_cells(slots, layout))
    reference.write_kv(pools[1], 2, key, value, slots)
    assert torch.equal(pools[0], pools[1])
