"""Pools with something in them, and poison everywhere else."""

from collections.abc import Sequence

import torch

from kernels import KVFormat, KVLayout
from kernels.kv_cells import write_cells


def filled_pool(layout: KVLayout, context_lens: Sequence[int], *, layer: int, seed: int = 0) -> tuple[torch.Tensor, list[list[int]]]:
    """A pool whose blocks are shuffled among strangers', with random cells where these sequences have some; all other cells are NaN."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context_len // layout.block_size) for context_len in context_lens]
    total = 2 * sum(counts) + 3
    order = torch.randperm(total, generator=generator).tolist()
    tables, start = [], 0
    for count in counts:
        tables.append(order[start : start + count])
        start += count
    pool = layout.allocate(total, torch.device("cpu"))
    if layout.format is KVFormat.PLAIN:
        pool.fill_(float("nan"))
    else:
        layout.scales(pool).fill_(float("nan"))
    for table, context_len in zip(tables, context_lens, strict=True):
        if context_len:
            key = torch.randn(context_len, layout.num_kv_heads, layout.head_dim, generator=generator)
            value = torch.randn(context_len, layout.num_kv_heads, layout.value_dim, generator=generator)
            write_cells(pool, layout, layer, key, value, slots_of(table, context_len, layout.block_size))
    return pool, tables


def slots_of(table: Sequence[int], context_len: int, block_size: int) -> torch.Tensor:
    """The cells of a sequence's tokens."""
    positions = torch.arange(context_len)
    return torch.tensor(table)[positions // block_size] * block_size + positions % block_size


def random_tree(query_lens: Sequence[int], *, seed: int = 0) -> torch.Tensor:
    """Ancestors of new tokens: each one's parent is an earlier one of its sequence, or the context."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for query_len in query_lens:
        bits: list[int] = []
        for node in range(query_len):
            parent = int(torch.randint(-1, node, (1,), generator=generator)) if node else -1
            bits.append((bits[parent] if parent >= 0 else 0) | 1 << node)
        rows.extend(bits)
    return torch.tensor(rows)
