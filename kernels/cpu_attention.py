"""Paged attention on the CPU: decode as one compiled pass over each sequence's blocks, prefill with PyTorch's flash kernel.

Decode is bound by the bytes of the keys and values. The compiled loop reads exactly the visible cells, once, in place, with one running
softmax per query head, so a sequence's result does not depend on its neighbours in the batch. Prefill is bound by arithmetic: one
sequence at a time, its cached prefix and its own causal chunk are two flash calls, merged by their log-sum-exps. Both read K and V from
the pool, as stored. What these two cannot do (quantized cells, latents, values wider than keys, soft-capped scores, sinks, trees, lists of
blocks) is computed densely, sequence by sequence. Specification: reference.paged_attention. Source of the running softmax: Milakov and
Gimelshein 2018; of the merge: Dao et al. 2023 (Flash-Decoding).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from kernels import cpu_loops
from kernels.block_lists import BlockLists
from kernels.cpu_loops import LOG2_E, Array, as_array, launch
from kernels.kv_cells import read_cells
from kernels.kv_layout import KVFormat, KVLayout

_flash: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Work of the leading sequences, which have one new token each.

    block_tables    [B, M] int64, rows filled up with anything
    context_lens    [B] int64
    first_visible   [B] int64: cells before it lie outside the window
    """

    block_tables: Array
    context_lens: Array
    first_visible: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """Work of one sequence with several new tokens: rows start … end of the query, after `prefix_len` older tokens.

    head_rows   [Hk * blocks] rows of the pool's [block, layer, head] view for layer 0, head by head
    context_len tokens read, the new ones included; like prefix_len without leading blocks that no query's window reaches
    bias        [T, context_len] 0 or -inf when a window hides something, else None
    """

    start: int
    end: int
    prefix_len: int
    context_len: int
    head_rows: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePlan:
    """Work of one sequence computed densely: rows start … end of the query; hidden [q, C] or [Hk, q, C], True where nothing is seen."""

    start: int
    end: int
    block_table: Sequence[int]
    context_len: int
    hidden: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """What every layer of one window does in one step; made once per step, used by each layer. Either dense or the other two."""

    layout: KVLayout
    decode: DecodePlan | None = None
    prefills: tuple[PrefillPlan, ...] = ()
    dense: tuple[DensePlan, ...] = ()


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
) -> AttentionPlan:
    """See kernels.backend."""
    is_plain = layout.format is KVFormat.PLAIN and not layout.is_latent and layout.value_dim <= layout.head_dim
    if not (is_plain and plain_scores) or ancestors is not None or block_lists is not None:
        dense, start = [], 0
        for index, (table, query_len, context_len) in enumerate(zip(block_tables, query_lens, context_lens, strict=True)):
            end = start + query_len
            tree = None if ancestors is None else ancestors[start:end]
            lists = None if block_lists is None else block_lists[index]
            hidden = _hidden(query_len, context_len, layout.block_size, window, tree, lists)
            table = table[: -(-context_len // layout.block_size)]
            dense.append(DensePlan(start=start, end=end, block_table=table, context_len=context_len, hidden=hidden))
            start = end
        return AttentionPlan(layout=layout, dense=tuple(dense))
    num_decodes = next((i for i, query_len in enumerate(query_lens) if query_len != 1), len(query_lens))
    decode = None
    if num_decodes:
        decode = _plan_decode(block_tables[:num_decodes], context_lens[:num_decodes], window)
    prefills = []
    start = num_decodes
    for table, query_len, context_len in zip(block_tables[num_decodes:], query_lens[num_decodes:], context_lens[num_decodes:], strict=True):
        prefills.append(_plan_prefill(table, start, query_len, context_len, layout, window))
        start += query_len
    return AttentionPlan(layout=layout, decode=decode, prefills=tuple(prefills))


def _hidden(
    query_len: int, context_len: int, block_size: int, window: int | None, ancestors: torch.Tensor | None, lists: BlockLists | None
) -> torch.Tensor:
    """See DensePlan."""
    prefix_len = context_len - query_len
    position, cell = torch.arange(prefix_len, context_len)[:, None], torch.arange(context_len)
    hidden = cell > position
    if ancestors is not None:
        seen = (ancestors[:, None] >> torch.arange(query_len) & 1) == 1
        hidden = torch.cat((torch.zeros(query_len, prefix_len, dtype=torch.bool), ~seen), dim=1)
        position = prefix_len + seen.sum(1, keepdim=True) - 1
    if window is not None:
        hidden = hidden | (position - cell >= window)
    if lists is not None:
        hidden = hidden | ~lists.mask(context_len, block_size)[:, prefix_len:]
    return hidden


def _plan_decode(block_tables: Sequence[Sequence[int]], context_lens: Sequence[int], window: int | None) -> DecodePlan:
    tables = np.zeros((len(block_tables), max(map(len, block_tables))), dtype=np.int64)
    for row, table in zip(tables, block_tables, strict=True):
        row[: len(table)] = table
    contexts = np.asarray(context_lens, dtype=np.int64)
    first_visible = np.zeros_like(contexts) if window is None else np.maximum(contexts - window, 0)
    return DecodePlan(block_tables=tables, context_lens=contexts, first_visible=first_visible)


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


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    plan: AttentionPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See reference.paged_attention; the lists it takes are in the plan."""
    if plan.dense:
        parts = [_dense(query[work.start : work.end], pool, layer, plan.layout, work, scale, softcap, sinks) for work in plan.dense]
        return torch.cat(parts)
    assert softcap is None and sinks is None, "such scores have to be planned for"
    output = query.new_empty(*query.shape[:2], plan.layout.value_dim)
    decode = plan.decode
    if decode is not None:
        launch(
            cpu_loops.decode_attention,
            len(decode.context_lens) * pool.shape[2],
            int(decode.context_lens.sum()) * pool[0, 0, :, 0].nbytes,
            as_array(query),
            as_array(pool),
            layer,
            decode.block_tables,
            decode.context_lens,
            decode.first_visible,
            scale * LOG2_E,
            as_array(output),
        )
    for prefill in plan.prefills:
        output[prefill.start : prefill.end] = _prefill(query[prefill.start : prefill.end], pool, layer, plan.layout, prefill, scale)
    return output


def _dense(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    layout: KVLayout,
    plan: DensePlan,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    heads = layout.num_kv_heads
    keys, values = (part[:, : plan.context_len] for part in read_cells(pool, layout, layer, plan.block_table))
    grouped = query.float().view(len(query), heads, -1, query.shape[2]).permute(1, 2, 0, 3)  # [Hk, group, q, D]
    scores = (grouped @ keys[:, None].transpose(2, 3)).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores.masked_fill_(plan.hidden[:, None] if plan.hidden.dim() == 3 else plan.hidden, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.float().view(heads, -1, 1, 1).expand(-1, -1, scores.shape[2], 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    attended: torch.Tensor = weights @ values[:, None]
    return attended.permute(2, 0, 1, 3).reshape(len(query), -1, layout.value_dim).to(query.dtype)


def _prefill(query: torch.Tensor, pool: torch.Tensor, layer: int, layout: KVLayout, plan: PrefillPlan, scale: float) -> torch.Tensor:
    num_tokens, num_heads, head_dim = query.shape
    heads, block_size = pool.shape[2], pool.shape[3]
    group = num_heads // heads
    # KV heads are the batch and the group's query heads the heads of one call, so that K and V are shared without a copy.
    grouped = query.view(num_tokens, heads, group, head_dim).permute(1, 2, 0, 3).to(pool.dtype)
    rows = pool.view(-1, block_size * layout.cell_numbers).index_select(0, plan.head_rows + layer * heads)
    cells = rows.view(heads, 1, -1, layout.cell_numbers)[:, :, : plan.context_len]
    key, value = cells[..., :head_dim], cells[..., head_dim:]
    if layout.value_dim < head_dim:  # the flash kernel takes values of the keys' size only
        value = F.pad(value, (0, head_dim - layout.value_dim))
    key, value = key.expand(-1, group, -1, -1), value.expand(-1, group, -1, -1)
    if plan.bias is not None:
        output, _ = _flash(grouped, key, value, attn_mask=plan.bias[None, None], scale=scale)
    else:
        prefix_len = plan.prefix_len
        output, lse = _flash(grouped, key[:, :, prefix_len:], value[:, :, prefix_len:], is_causal=True, scale=scale)
        if prefix_len:
            prefix_output, prefix_lse = _flash(grouped, key[:, :, :prefix_len], value[:, :, :prefix_len], scale=scale)
            # softmax over two log-sum-exps is a sigmoid of their difference
            output = torch.lerp(output.float(), prefix_output.float(), torch.sigmoid(prefix_lse - lse)[..., None])
    return output[..., : layout.value_dim].permute(2, 0, 1, 3).reshape(num_tokens, num_heads, layout.value_dim)
