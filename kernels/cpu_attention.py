"""Paged attention on the CPU, built from PyTorch's flash kernel and log-sum-exp merging.

Decode: every KV block is one item of a batched flash call (its sequence's query against its block_size keys), and the blocks of a
sequence are merged by their log-sum-exps (split-KV with the block as the split). Ragged batches pay for their blocks only, and when
the blocks lie close together in the pool they are read in place, without gathering. Prefill: one sequence at a time; its cached prefix
and its own causal chunk are two calls, merged likewise. All of it reads K and V from the pool, as stored.
Specification: reference.paged_attention. Source of the merge: Dao et al. 2023 (Flash-Decoding); Milakov and Gimelshein 2018.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.kv_layout import KVLayout

_flash: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Reading a range of the pool in place computes the blocks between ours in vain; beyond this share gathering is cheaper.
MAX_RANGE_WASTE = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Work of the leading sequences, which have one new token each: B of them, with S items (blocks) in all.

    pool_range      (first, end) block ids to read in place, or None: gather `block_ids` [S]
    owner           [S] which sequence an item belongs to
    bias            [S, 1, 1, N] 0 or -inf: cells beyond the context or outside the window
    merge_index     [B * M] the item of each sequence's m-th block; `merge_bias` [B, M, 1] is -inf where it has none
    """

    num_sequences: int
    pool_range: tuple[int, int] | None
    block_ids: torch.Tensor
    owner: torch.Tensor
    bias: torch.Tensor
    merge_index: torch.Tensor
    merge_bias: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """Work of one sequence with several new tokens: rows start … end of the query, after `prefix_len` older tokens.

    head_rows   [Hk * blocks] rows of the pool's [block, layer, head] view for layer 0, head by head
    skipped     leading tokens left out because no query's window reaches them
    bias        [T, C - skipped] 0 or -inf when a window hides something, else None
    """

    start: int
    end: int
    prefix_len: int
    context_len: int
    head_rows: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """What every layer of one window does in one step; made once per step, used by each layer."""

    decode: DecodePlan | None
    prefills: tuple[PrefillPlan, ...]


def plan_attention(
    *,
    block_tables: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    layout: KVLayout,
    window: int | None = None,
) -> AttentionPlan:
    """Arguments as in reference.paged_attention; sequences with one new token come first, and the window is None or positive."""
    num_decodes = next((i for i, query_len in enumerate(query_lens) if query_len != 1), len(query_lens))
    decode = None
    if num_decodes:
        decode = _plan_decode(block_tables[:num_decodes], context_lens[:num_decodes], layout, window)
    prefills = []
    start = num_decodes
    for table, query_len, context_len in zip(block_tables[num_decodes:], query_lens[num_decodes:], context_lens[num_decodes:], strict=True):
        prefills.append(_plan_prefill(table, start, query_len, context_len, layout, window))
        start += query_len
    return AttentionPlan(decode=decode, prefills=tuple(prefills))


def _plan_decode(block_tables: Sequence[Sequence[int]], context_lens: Sequence[int], layout: KVLayout, window: int | None) -> DecodePlan:
    block_size = layout.block_size
    contexts = np.asarray(context_lens)
    first_visible = np.zeros_like(contexts) if window is None else np.maximum(contexts - window, 0)
    first_block = first_visible // block_size
    counts = -(-contexts // block_size) - first_block
    block_ids = np.concatenate(
        [np.asarray(table[first : first + count]) for table, first, count in zip(block_tables, first_block, counts, strict=True)]
    )
    owner = np.repeat(np.arange(len(contexts)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # m: an item's place within its sequence
    cell = ((first_block[owner] + rank) * block_size)[:, None] + np.arange(block_size)
    hidden = (cell >= contexts[owner, None]) | (cell < first_visible[owner, None])

    low, end = int(block_ids.min()), int(block_ids.max()) + 1
    in_place = end - low <= MAX_RANGE_WASTE * len(block_ids) and len(np.unique(block_ids)) == len(block_ids)
    item = block_ids - low if in_place else np.arange(len(block_ids))
    num_items = end - low if in_place else len(block_ids)
    item_owner = np.zeros(num_items, dtype=np.int64)
    item_owner[item] = owner
    bias = np.zeros((num_items, block_size), dtype=np.float32)
    bias[item] = np.where(hidden, -np.inf, 0.0)
    width = int(counts.max())
    merge_index = np.zeros((len(contexts), width), dtype=np.int64)
    merge_index[owner, rank] = item
    merge_bias = np.where(np.arange(width) < counts[:, None], 0.0, -np.inf).astype(np.float32)
    return DecodePlan(
        num_sequences=len(contexts),
        pool_range=(low, end) if in_place else None,
        block_ids=torch.from_numpy(block_ids),
        owner=torch.from_numpy(item_owner),
        bias=torch.from_numpy(bias)[:, None, None].to(layout.dtype),
        merge_index=torch.from_numpy(merge_index).flatten(),
        merge_bias=torch.from_numpy(merge_bias)[..., None],
    )


def _plan_prefill(
    block_table: Sequence[int], start: int, query_len: int, context_len: int, layout: KVLayout, window: int | None
) -> PrefillPlan:
    block_size, heads = layout.block_size, layout.num_kv_heads
    prefix_len = context_len - query_len
    first_block = 0 if window is None else max(prefix_len - window + 1, 0) // block_size
    skipped = first_block * block_size
    blocks = torch.tensor(block_table[first_block : -(-context_len // block_size)])
    head_rows = (blocks * (layout.num_layers * heads))[None, :] + torch.arange(heads)[:, None]
    bias = None
    if window is not None and context_len > window:
        distance = torch.arange(prefix_len, context_len)[:, None] - torch.arange(skipped, context_len)[None, :]
        hidden = (distance < 0) | (distance >= window)
        bias = torch.zeros(hidden.shape, dtype=layout.dtype).masked_fill_(hidden, float("-inf"))
    return PrefillPlan(
        start=start,
        end=start + query_len,
        prefix_len=prefix_len - skipped,
        context_len=context_len - skipped,
        head_rows=head_rows.flatten(),
        bias=bias,
    )


def kv_cells(slots: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """[T * Hk] rows of layer 0 in the pool's [.., 2 D] view for the cells `slots` [T] (block_id * block_size + offset) of each head."""
    block, offset = slots // layout.block_size, slots % layout.block_size
    first_row = block * (layout.num_layers * layout.num_kv_heads * layout.block_size) + offset
    return (first_row[:, None] + torch.arange(layout.num_kv_heads) * layout.block_size).flatten()


def write_kv(pool: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor, cells: torch.Tensor) -> None:
    """See reference.write_kv; `cells` comes from kv_cells, once per step for all layers."""
    _, _, heads, block_size, width = pool.shape
    rows = torch.cat((key, value), dim=-1).view(-1, width).to(pool.dtype)
    pool.view(-1, width).index_copy_(0, cells + layer * heads * block_size, rows)


def paged_attention(query: torch.Tensor, pool: torch.Tensor, layer: int, plan: AttentionPlan, *, scale: float) -> torch.Tensor:
    """See reference.paged_attention; the lists it takes are in the plan."""
    output = torch.empty_like(query)
    if plan.decode is not None:
        rows = plan.decode.num_sequences
        output[:rows] = _decode(query[:rows], pool, layer, plan.decode, scale)
    for prefill in plan.prefills:
        output[prefill.start : prefill.end] = _prefill(query[prefill.start : prefill.end], pool, layer, prefill, scale)
    return output


def _decode(query: torch.Tensor, pool: torch.Tensor, layer: int, plan: DecodePlan, scale: float) -> torch.Tensor:
    num_sequences, num_heads, head_dim = query.shape
    heads = pool.shape[2]
    grouped = query.view(num_sequences, heads, num_heads // heads, head_dim).to(pool.dtype)
    if plan.pool_range is not None:
        cells = pool[plan.pool_range[0] : plan.pool_range[1], layer]
    else:
        cells = pool[:, layer].index_select(0, plan.block_ids)
    item_query = grouped.index_select(0, plan.owner)
    item_output, item_lse = _flash(
        item_query, cells[..., :head_dim], cells[..., head_dim:], attn_mask=plan.bias, scale=scale
    )  # [S, Hk, G, D], [S, Hk, G]
    width = plan.merge_bias.shape[1]
    # The flash kernel lays its output out token-major: [S, G, Hk, D] in memory.
    flat_output = item_output.transpose(1, 2).reshape(-1, num_heads * head_dim).index_select(0, plan.merge_index)
    group_major = flat_output.view(num_sequences, width, num_heads // heads, heads, head_dim).float()
    lse = item_lse.transpose(1, 2).reshape(-1, num_heads).index_select(0, plan.merge_index)
    weight = (lse.view(num_sequences, width, num_heads) + plan.merge_bias).softmax(1)
    merged = (group_major * weight.view(num_sequences, width, num_heads // heads, heads, 1)).sum(1)
    return merged.transpose(1, 2).reshape(num_sequences, num_heads, head_dim)


def _prefill(query: torch.Tensor, pool: torch.Tensor, layer: int, plan: PrefillPlan, scale: float) -> torch.Tensor:
    num_tokens, num_heads, head_dim = query.shape
    heads, block_size = pool.shape[2], pool.shape[3]
    group = num_heads // heads
    # KV heads are the batch and the group's query heads the heads of one call, so that K and V are shared without a copy.
    grouped = query.view(num_tokens, heads, group, head_dim).permute(1, 2, 0, 3).to(pool.dtype)
    rows = pool.view(-1, block_size * 2 * head_dim).index_select(0, plan.head_rows + layer * heads)
    cells = rows.view(heads, 1, -1, 2 * head_dim)[:, :, : plan.context_len].expand(-1, group, -1, -1)
    key, value = cells[..., :head_dim], cells[..., head_dim:]
    if plan.bias is not None:
        output, _ = _flash(grouped, key, value, attn_mask=plan.bias[None, None], scale=scale)
    else:
        prefix_len = plan.prefix_len
        output, lse = _flash(grouped, key[:, :, prefix_len:], value[:, :, prefix_len:], is_causal=True, scale=scale)
        if prefix_len:
            prefix_output, prefix_lse = _flash(grouped, key[:, :, :prefix_len], value[:, :, :prefix_len], scale=scale)
            # softmax over two log-sum-exps is a sigmoid of their difference
            output = torch.lerp(output.float(), prefix_output.float(), torch.sigmoid(prefix_lse - lse)[..., None])
    return output.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)
