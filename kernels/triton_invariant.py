"""Triton's functions in batch-invariant mode: a token has the same bits however its prompt is cut, cached and batched with others.

Norms, rotation and what is done number by number are so in any case. Attention sums a token's context in parts of whole blocks, counted
from its beginning, in tiles of one size, with the same blocks masked, whether the token comes alone or amid a prompt; products are
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
from kernels.triton_attention import INVARIANT_CHUNK, DecodePlan, PrefillPlan, capability, plan_decode, tile_rows
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
IS_INVARIANT = True
PARTS_BYTES = 256 << 20  # of one launch at most; a batch that leaves more is several


@dataclass(frozen=True, slots=True)
class Run:
    """query_len new tokens of a sequence, of which the last sees context_len tokens, itself included."""

    sequence: int
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
    runs_to_come = invariant_runs(query_lens, context_lens, layout.block_size, window)
    for runs in _launches(runs_to_come, layout, num_heads // layout.num_kv_heads, tile_rows(1, layout, capability(device), invariant=True)):
        part = plan_decode(
            block_tables=[_table(block_tables[run.sequence], run, context_lens[run.sequence], layout.block_size) for run in runs],
            query_lens=[run.query_len for run in runs],
            context_lens=[run.context_len for run in runs],
            **same,
            first_row=first_row,
            invariant=True,
        )
        parts.append(part)
        first_row += part.num_tokens
    return TritonPlan(parts, layout)


def invariant_runs(query_lens: Sequence[int], context_lens: Sequence[int], block_size: int, window: int | None) -> Iterator[Run]:
    """The new tokens in runs that have the same blocks to mask: those of their last cells, and those where their windows begin."""
    for sequence, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        token = context_len - query_len
        while token < context_len:
            end = min(context_len, token // block_size * block_size + block_size)
            if window is not None:
                first_seen = max(token - window + 1, 0)
                end = min(end, window - 1 + first_seen // block_size * block_size + block_size)
            yield Run(sequence, end - token, end)
            token = end


def _table(blocks: Sequence[int], run: Run, context_len: int, block_size: int) -> Sequence[int]:
    """As far as a run sees it; that of a sequence's last as it is, for plans of those are filled again with longer ones."""
    return blocks if run.context_len == context_len else blocks[: -(-run.context_len // block_size)]


def _launches(runs: Iterator[Run], layout: KVLayout, group: int, most: int) -> Iterator[list[Run]]:
    """Runs that are launched together. Single tokens come by themselves: every run of a launch has as many tiles as its longest needs.

    group   query heads of a KV head; most: rows of a tile
    """
    together: list[Run] = []
    longest = num_blocks = 0
    for run in runs:
        blocks = -(-run.context_len // layout.block_size)
        rows, parts = group * max(longest, run.query_len), -(-max(num_blocks, blocks) // INVARIANT_CHUNK)
        slots = (len(together) + 1) * layout.num_kv_heads * -(-rows // most) * parts
        needed = 4 * slots * most * triton.next_power_of_2(layout.value_dim)
        if together and (longest == 1 < run.query_len or needed > PARTS_BYTES):
            yield together
            together, longest, num_blocks = [], 0, 0
        together.append(run)
        longest, num_blocks = max(longest, run.query_len), max(num_blocks, blocks)
    if together:
        yield together
