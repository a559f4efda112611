"""The tensor functions by Triton: on CUDA, and in Triton's interpreter on the CPU, where tests run them.

Specification: the functions of the same names in reference; signatures: kernels.backend.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kernels import triton_elementwise, triton_kv
from kernels.block_lists import BlockLists
from kernels.kv_layout import KVFormat, KVLayout
from kernels.triton_attention import (
    MAX_DECODE_QUERY,
    DecodePlan,
    PrefillPlan,
    padded,
    plan_decode,
    plan_prefill,
    run_decode,
    run_prefill,
    share_units,
)

INVARIANCE = ""

TOKENS_PER_PROGRAM = 16
WORDS_PER_PROGRAM = 4096
MERGED_PER_PROGRAM = 2048


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """What every layer of one window does in one step: a launch for each part, of rows that follow those of the part before."""

    parts: list[DecodePlan | PrefillPlan]
    layout: KVLayout


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
    """See kernels.backend."""
    most = 0 if block_lists is not None else MAX_DECODE_QUERY
    num_decodes = next((index for index, query_len in enumerate(query_lens) if query_len > most), len(query_lens))
    assert ancestors is None or num_decodes == len(query_lens), "a tree has at most MAX_DECODE_QUERY tokens"
    parts: list[DecodePlan | PrefillPlan] = []
    if num_decodes:
        decode = plan_decode(
            block_tables=block_tables[:num_decodes],
            query_lens=query_lens[:num_decodes],
            context_lens=context_lens[:num_decodes],
            layout=layout,
            num_heads=num_heads,
            device=device,
            window=window,
            ancestors=ancestors,
        )
        parts.append(decode)
    if num_decodes < len(query_lens):
        prefill = plan_prefill(
            block_tables=block_tables[num_decodes:],
            query_lens=query_lens[num_decodes:],
            context_lens=context_lens[num_decodes:],
            layout=layout,
            num_heads=num_heads,
            device=device,
            window=window,
            first_row=sum(query_lens[:num_decodes]),
            block_lists=block_lists,
        )
        parts.append(prefill)
    return TritonPlan(parts, layout)


def refill_plan(plan: TritonPlan, *, block_tables: Sequence[Sequence[int]], context_lens: Sequence[int]) -> None:
    """See kernels.backend."""
    first = 0
    for part in plan.parts:
        end = first + len(part.context_lens)
        tables = padded(block_tables[first:end])
        part.block_tables[:, : tables.shape[1]].copy_(tables)
        part.context_lens.copy_(torch.tensor(context_lens[first:end], dtype=torch.int32))
        first = end


def share_work(plan: TritonPlan, *, num_heads: int) -> None:
    """See kernels.backend."""
    for part in plan.parts:
        assert isinstance(part, DecodePlan)
        share_units(part, num_heads)


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    plan: TritonPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See reference.paged_attention; the lists it takes are in the plan."""
    return attention_with_log_sums(query, pool, layer, plan, scale=scale, softcap=softcap, sinks=sinks)[0]


def attention_with_log_sums(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    plan: TritonPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As paged_attention, and the log sums by which several parts of a context can be merged."""
    output = query.new_empty(*query.shape[:2], plan.layout.value_dim)
    log_sums = torch.empty(query.shape[:2], device=query.device)
    for part in plan.parts:
        rows = slice(part.first_row, part.first_row + part.num_tokens)
        more: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks, "output": output[rows], "log_sums": log_sums[rows]}
        if isinstance(part, DecodePlan):
            run_decode(query[rows], pool, layer, part, **more)
        else:
            run_prefill(query[rows], pool, layer, part, **more)
    return output, log_sums


def rope_and_write_kv(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    layout: KVLayout,
    layer: int,
    *,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """See reference.rope_and_write_kv; qkv is contiguous."""
    num_tokens, num_heads, head_dim = qkv.shape
    num_queries = num_heads - 2 * layout.num_kv_heads
    query = qkv.new_empty(num_tokens, num_queries, head_dim)
    numbers = layout.numbers(pool)[:, layer]
    scales = None if layout.format is KVFormat.PLAIN else layout.scales(pool)[:, layer]
    triton_kv.rope_and_write_kv[(triton.cdiv(num_tokens, TOKENS_PER_PROGRAM), num_heads)](
        qkv,
        query,
        numbers,
        scales,
        positions,
        slots,
        cos,
        sin,
        query_norm,
        key_norm,
        num_tokens,
        eps,
        numbers.stride(0),
        numbers.stride(1),
        0 if scales is None else scales.stride(0),
        0 if scales is None else scales.stride(1),
        HEADS=num_queries,
        KV_HEADS=layout.num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        BLOCK_T=TOKENS_PER_PROGRAM,
        BLOCK_N=layout.block_size,
        CELL=numbers.stride(2),
        FORMAT=layout.format.value,
        HAS_NORM=query_norm is not None,
        enable_fp_fusion=False,
    )
    return query


def rope_and_write_latent(
    query: torch.Tensor,
    cell: torch.Tensor,
    pool: torch.Tensor,
    layout: KVLayout,
    layer: int,
    *,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
) -> None:
    """See reference.rope_and_write_latent; query and cell are contiguous and of the pool's dtype."""
    num_tokens, num_heads, query_dim = query.shape
    half = (layout.head_dim - layout.value_dim) // 2
    numbers = pool[:, layer]
    triton_kv.rope_and_write_latent[(triton.cdiv(num_tokens, TOKENS_PER_PROGRAM), num_heads + 1)](
        query,
        cell,
        numbers,
        positions,
        slots,
        cos,
        sin,
        norm,
        num_tokens,
        eps,
        numbers.stride(0),
        HEADS=num_heads,
        QUERY=query_dim,
        LATENT=layout.value_dim,
        BLOCK_LATENT=triton.next_power_of_2(layout.value_dim),
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_T=TOKENS_PER_PROGRAM,
        BLOCK_N=layout.block_size,
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference.rms_norm; x [T, H] is contiguous."""
    return _norm(x, None, weight, eps)


def add_rms_norm(residual: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference.add_rms_norm."""
    return _norm(delta, residual, weight, eps)


def _norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    output = torch.empty_like(x)
    width = x.shape[-1]
    triton_elementwise.rms_norm[(len(x),)](
        x, residual, weight, output, width, eps, BLOCK=triton.next_power_of_2(width), HAS_RESIDUAL=residual is not None
    )
    return output


def activate_and_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """See reference.activate_and_mul."""
    width = gate_up.shape[1] // 2
    output = gate_up.new_empty(len(gate_up), width)
    block = min(1024, triton.next_power_of_2(width))
    grid = (triton.cdiv(width, block), len(gate_up))
    triton_elementwise.activate_and_mul[grid](gate_up, output, width, BLOCK=block, IS_GELU=activation == "gelu_tanh")
    return output


def batched_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See kernels.backend."""
    return torch.bmm(x, weight.transpose(1, 2))


def merge_attention(outputs: torch.Tensor, log_sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.merge_attention; outputs [P, T, H, D] and log_sums [P, T, H], contiguous."""
    parts, num_tokens, num_heads, width = outputs.shape
    merged, log_sum = torch.empty_like(outputs[0]), torch.empty_like(log_sums[0])
    block = triton.next_power_of_2(width)
    rows = max(1, MERGED_PER_PROGRAM // block)
    num_rows = num_tokens * num_heads
    triton_elementwise.merge_attention[(triton.cdiv(num_rows, rows),)](
        outputs, log_sums, merged, log_sum, num_rows, PARTS=parts, WIDTH=width, BLOCK=block, ROWS=rows
    )
    return merged, log_sum


def copy_blocks(
    source: torch.Tensor,
    source_layout: KVLayout,
    target: torch.Tensor,
    target_layout: KVLayout,
    *,
    source_blocks: torch.Tensor | None = None,
    target_blocks: torch.Tensor | None = None,
    first_source_head: int = 0,
    first_target_head: int = 0,
    num_heads: int | None = None,
) -> None:
    """See kv_cells.copy_blocks; block ids are int32 on the device."""
    heads = source_layout.num_kv_heads - first_source_head if num_heads is None else num_heads
    blocks = source_blocks if source_blocks is not None else target_blocks
    num_blocks = len(source) if blocks is None else len(blocks)
    if source_layout.format is target_layout.format and source_layout.dtype == target_layout.dtype:
        from_words, to_words = _words(source, source_layout, first_source_head), _words(target, target_layout, first_target_head)
        num_words = heads * source_layout.head_bytes // 4
        triton_kv.copy_heads[(num_blocks, source_layout.num_layers, triton.cdiv(num_words, WORDS_PER_PROGRAM))](
            from_words,
            to_words,
            source_blocks,
            target_blocks,
            *from_words.stride()[:2],
            *to_words.stride()[:2],
            num_words,
            BLOCK=WORDS_PER_PROGRAM,
        )
        return
    numbers, scales = _from_head(source, source_layout, first_source_head)
    target_numbers, target_scales = _from_head(target, target_layout, first_target_head)
    triton_kv.convert_heads[(num_blocks, source_layout.num_layers, heads)](
        numbers,
        scales,
        target_numbers,
        target_scales,
        source_blocks,
        target_blocks,
        *numbers.stride()[:3],
        *(scales.stride()[:3] if scales is not None else (0, 0, 0)),
        *target_numbers.stride()[:3],
        *(target_scales.stride()[:3] if target_scales is not None else (0, 0, 0)),
        KEY=source_layout.head_dim,
        VALUE=source_layout.cell_numbers - source_layout.head_dim,
        BLOCK_KEY=triton.next_power_of_2(source_layout.head_dim),
        BLOCK_VALUE=triton.next_power_of_2(max(1, source_layout.cell_numbers - source_layout.head_dim)),
        BLOCK_N=source_layout.block_size,
        SOURCE_CELL=numbers.stride(3),
        TARGET_CELL=target_numbers.stride(3),
        SOURCE_FORMAT=source_layout.format.value,
        TARGET_FORMAT=target_layout.format.value,
        enable_fp_fusion=False,
    )


def _words(pool: torch.Tensor, layout: KVLayout, first_head: int) -> torch.Tensor:
    """[blocks, layers, words] int32, from a head on."""
    return pool.view(torch.uint8).view(len(pool), layout.num_layers, -1)[..., first_head * layout.head_bytes :].view(torch.int32)


def _from_head(pool: torch.Tensor, layout: KVLayout, first_head: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    scales = None if layout.format is KVFormat.PLAIN else layout.scales(pool)[:, :, first_head:]
    return layout.numbers(pool)[:, :, first_head:], scales
