"""Triton's functions in batch-invariant mode: a token has the same bits however its prompt is cut, cached and batched with others.

Norms, rotation and what is done number by number are so in any case. Attention sums a token's context in parts of whole blocks, counted
from the first that it sees, in tiles of one size, with the same blocks masked, whether the token comes alone or amid a prompt; products are
triton_linear's. Signatures: kernels.backend.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kernels import triton_backend
from kernels.block_lists import BlockLists
from kernels.kv_layout import KVLayout
from kernels.triton_attention import DecodePlan, PrefillPlan, parts_room, plan_decode
from kernels.triton_backend import (
    TritonPlan,
    activate_and_mul,
    add_rms_norm,
    copy_blocks,
    paged_attention,
    refill_plan,
    rms_norm,
    rope_and_write_kv,
    rope_and_write_latent,
    share_work,
)
from kernels.triton_linear import batched_linear

__all__ = [
    "activate_and_mul",
    "add_rms_norm",
    "batched_linear",
    "copy_blocks",
    "paged_attention",
    "plan_attention",
    "refill_plan",
    "rms_norm",
    "rope_and_write_kv",
    "rope_and_write_latent",
    "share_work",
]
# What bits depend on besides the kind of GPU: the number goes up with every change to tiles and parts.
INVARIANCE = f"1, Triton {triton.__version__}"
PARTS_BYTES = 256 << 20  # of one launch, unless a single run leaves more; a batch that does is several


@dataclass(frozen=True, slots=True)
class Run:
    """query_len new tokens of a sequence, of which the last sees context_len tokens, itself included."""

    block_table: Sequence[int]
    query_len: int
    context_len: int


def plan_attention(
    *,
    block_tables: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    layout: KVLayout,
    num_heads: int,
    device: torch.device,
    window: int | None = None,
    plain_scores: bool = True,
    ancestors: torch.Tensor | None = None,
    block_lists: Sequence[BlockLists] | None = None,
) -> TritonPlan:
    """See kernels.backend. Trees and lists of blocks are planned as they come: the same bits in any batch, but not however they are cut."""
    same: dict[str, Any] = {"layout": layout, "num_heads": num_heads, "device": device, "window": window}
    lists: dict[str, Any] = {"block_tables": block_tables, "query_lens": query_lens, "context_lens": context_lens}
    if block_lists is not None:
        return triton_backend.plan_attention(**lists, **same, block_lists=block_lists)
    if ancestors is not None:
        return TritonPlan([plan_decode(**lists, **same, ancestors=ancestors, invariant=True)], layout)
    parts: list[DecodePlan | PrefillPlan] = []
    first_row = 0
    for runs in _launches(invariant_runs(**lists, block_size=layout.block_size, window=window), layout, num_heads, device):
        part = plan_decode(
            block_tables=[run.block_table for run in runs],
            query_lens=[run.query_len for run in runs],
            context_lens=[run.context_len for run in runs],
            **same,
            first_row=first_row,
            invariant=True,
        )
        parts.append(part)
        first_row += part.num_tokens
    return TritonPlan(parts, layout)


def invariant_runs(
    *,
    block_tables: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_size: int,
    window: int | None,
) -> Iterator[Run]:
    """The new tokens in runs that have the same blocks to mask: those of their last cells, and those where their windows begin."""
    for table, query_len, context_len in zip(block_tables, query_lens, context_lens, strict=True):
        token = context_len - query_len
        while token < context_len:
            end = min(context_len, token // block_size * block_size + block_size)
            if window is not None:
                first_seen = max(token - window + 1, 0)
                end = min(end, window - 1 + first_seen // block_size * block_size + block_size)
            # The last one's as it is: a plan that is refilled has room for what its tables have.
            yield Run(table if end == context_len else table[: -(-end // block_size)], end - token, end)
            token = end


def _launches(runs: Iterator[Run], layout: KVLayout, num_heads: int, device: torch.device) -> Iterator[list[Run]]:
    """Runs that are launched together. Single tokens come by themselves: every run of a launch has as many tiles as its longest needs."""
    together: list[Run] = []
    longest = width = 0
    for run in runs:
        query_len, blocks = max(longest, run.query_len), max(width, len(run.block_table))
        room = parts_room(len(together) + 1, query_len, blocks, layout, num_heads, device, invariant=True)
        if together and (longest == 1 < query_len or room.num_bytes > PARTS_BYTES):
            yield together
            together, query_len, blocks = [], run.query_len, len(run.block_table)
        together.append(run)
        longest, width = query_len, blocks
    if together:
        yield together
