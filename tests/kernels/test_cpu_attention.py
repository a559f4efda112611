"""Paged attention on the CPU against its specification: ragged lengths, block edges, windows, every head grouping."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kernels import cpu_backend, cpu_loops, reference
from kernels.cpu_attention import AttentionPlan
from kernels.cpu_backend import paged_attention
from kernels.kv_layout import KVLayout
from tests.kernels.conftest import SetThreads

# fp32 sums of the same products in another order; the flash kernel rounds 16-bit weights once more, and the result is rounded.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def plan_attention(layout: KVLayout, **arguments: Any) -> AttentionPlan:
    return cpu_backend.plan_attention(layout=layout, num_heads=layout.num_kv_heads, device=torch.device("cpu"), **arguments)


def scattered_pool(layout: KVLayout, context_lens: list[int]) -> tuple[torch.Tensor, list[list[int]]]:
    """A pool of noise with one table per sequence, its blocks shuffled among strangers' blocks."""
    counts = [-(-context_len // layout.block_size) for context_len in context_lens]
    total = 2 * sum(counts) + 3
    pool = torch.randn(total, *layout.block_shape).to(layout.dtype)
    order = torch.randperm(total)
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
    dtype: torch.dtype = torch.float32,
) -> AttentionPlan:
    layout = KVLayout(num_layers=3, num_kv_heads=heads, block_size=block_size, head_dim=head_dim, dtype=dtype)
    pool, tables = scattered_pool(layout, context_lens)
    query = torch.randn(sum(query_lens), heads * group, head_dim).to(dtype)
    plan = plan_attention(block_tables=tables, query_lens=query_lens, context_lens=context_lens, layout=layout, window=window)
    output = paged_attention(query, pool, 1, plan, scale=0.3)
    expected, _ = reference.paged_attention(
        query, pool, layout, 1, block_tables=tables, query_lens=query_lens, context_lens=context_lens, scale=0.3, window=window
    )
    assert output.isfinite().all()
    assert (output.float() - expected.float()).abs().max() <= TOLERANCE[dtype]
    return plan


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 40])
def test_paged_attention_on_a_mixed_ragged_batch_equals_the_reference(dtype: torch.dtype, window: int | None) -> None:
    plan = check_attention(
        [1, 15, 16, 17, 33, 100, 3, 16, 47, 90], [1, 1, 1, 1, 1, 1, 2, 16, 30, 64], window=window, dtype=dtype
    )  # fmt: skip
    assert plan.decode is not None and len(plan.decode.context_lens) == 6 and len(plan.prefills) == 4


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=6),
    heads=st.integers(1, 4),
    group=st.sampled_from([1, 2, 3, 8, 16]),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    block_size=st.sampled_from([16, 32, 64]),
    window=st.one_of(st.none(), st.integers(1, 100)),
)
def test_paged_attention_on_any_shape_equals_the_reference(
    lengths: list[tuple[int, int]], heads: int, group: int, head_dim: int, block_size: int, window: int | None
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
    )


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_decode_attention_gives_a_sequence_the_same_bits_alone_and_in_any_batch(
    torch_threads: SetThreads, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    torch_threads(num_threads)
    monkeypatch.setattr(cpu_loops, "_MIN_BYTES_PER_THREAD", 1)
    layout = KVLayout(num_layers=2, num_kv_heads=2, block_size=16, head_dim=32, dtype=torch.float32)
    contexts = [40, 1, 100, 16, 63]
    pool, tables = scattered_pool(layout, contexts)
    query = torch.randn(len(contexts), 4, 32)

    def attend(rows: list[int]) -> torch.Tensor:
        plan = plan_attention(
            block_tables=[tables[row] for row in rows],
            query_lens=[1] * len(rows),
            context_lens=[contexts[row] for row in rows],
            layout=layout,
        )
        return paged_attention(query[rows], pool, 1, plan, scale=0.2)

    together = attend([0, 1, 2, 3, 4])
    assert torch.equal(together, torch.cat([attend([row]) for row in range(5)]))
    assert torch.equal(together.flip(0), attend([4, 3, 2, 1, 0]))


def test_decode_attention_never_reads_a_cell_outside_the_context_or_the_window() -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=2, block_size=16, head_dim=32, dtype=torch.float32)
    pool, tables = scattered_pool(layout, [70])
    poisoned = torch.full_like(pool, float("nan"))
    for position in range(50, 70):  # a window of 20
        block, offset = tables[0][position // 16], position % 16
        poisoned[block, 1, :, offset] = pool[block, 1, :, offset]
    query = torch.randn(1, 4, 32)
    plan = plan_attention(block_tables=tables, query_lens=[1], context_lens=[70], layout=layout, window=20)
    assert torch.equal(paged_attention(query, poisoned, 1, plan, scale=0.2), paged_attention(query, pool, 1, plan, scale=0.2))


@pytest.mark.parametrize("half", ["key", "value"])
def test_decode_attention_when_a_visible_cell_is_nan_says_so(half: str) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=1, block_size=16, head_dim=8, dtype=torch.float32)
    pool, tables = scattered_pool(layout, [20])
    pool[tables[0][0], 0, 0, 3, 0 if half == "key" else 8] = float("nan")
    plan = plan_attention(block_tables=tables, query_lens=[1], context_lens=[20], layout=layout)
    assert paged_attention(torch.randn(1, 1, 8), pool, 0, plan, scale=1.0).isnan().any()


def test_decode_attention_when_scores_are_huge_takes_the_best_cell() -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=1, block_size=16, head_dim=8, dtype=torch.float32)
    pool, tables = scattered_pool(layout, [40])
    query = torch.randn(1, 1, 8) * 1e4
    plan = plan_attention(block_tables=tables, query_lens=[1], context_lens=[40], layout=layout)
    expected, _ = reference.paged_attention(query, pool, layout, 0, block_tables=tables, query_lens=[1], context_lens=[40], scale=1.0)
    assert torch.allclose(paged_attention(query, pool, 0, plan, scale=1.0), expected)
