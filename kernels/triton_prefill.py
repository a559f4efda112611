"""Attention of many new tokens per sequence over its paged context: prefill behind a cached prefix, causal, dense or by lists of blocks.

A program has one tile: consecutive new tokens of one sequence with all query heads of one KV head, so that these read its keys and values
together. It passes over the blocks that every row sees, which needs no masks, and over the few at the window's edge and on the diagonal,
which do. Tiles with the most blocks come first, for the last to end decides.

With lists a tile reads, besides its diagonal blocks, those that its list names and no others: every sparse pattern whose unit is a block is
data (see block_lists), and costs what it visits.

Specification: reference.paged_attention. Source: FlashAttention-2 (Dao 2023), chunked prefill over a paged cache (Sarathi, vLLM).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.triton_tile import PLAIN, attend, finish


@triton.jit(do_not_specialize=["table_stride", "list_stride", "list_len_stride"])
def prefill_attention(
    query,
    numbers,
    scales,
    tables,
    tile_sequences,
    tile_tokens,
    context_lens,
    query_starts,
    lists,
    list_lens,
    sinks,
    output,
    log_sums,
    table_stride,
    list_stride,
    list_head_stride,
    list_len_stride,
    query_stride,
    number_stride,
    number_head_stride,
    scale_stride,
    scale_head_stride,
    score_scale,
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    REST: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CELL: tl.constexpr,
    SHARED: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Programs (KV head, tile). tile_sequences, tile_tokens [tiles]: whose new tokens a tile has, and the first of them.

    lists   [tiles, KV_HEADS, …] block ids that all rows of the tile see whole; list_lens [tiles, KV_HEADS]: how many
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = tl.load(tile_sequences + tile)
    first_token = tl.load(tile_tokens + tile)
    context_len = tl.load(context_lens + sequence)
    query_start = tl.load(query_starts + sequence)
    query_len = tl.load(query_starts + sequence + 1) - query_start
    prefix_len = context_len - query_len
    # A tile ends with its tokens, the sequence's, or where its list does: at a block's edge.
    end_token = tl.minimum(first_token + TOKENS, query_len)
    if HAS_LISTS:
        block_end = (prefix_len + first_token) // BLOCK_N * BLOCK_N + BLOCK_N - prefix_len
        end_token = tl.minimum(end_token, block_end)
    rows = tl.arange(0, BLOCK_M)
    key_columns, value_columns = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    rest_columns = tl.arange(0, REST if REST > 0 else 16)
    token = first_token + rows // GROUP
    query_head = head * GROUP + rows % GROUP
    is_row = token < end_token
    row_token = query_start + tl.where(is_row, token, 0)
    row_positions = prefix_len + token
    row_query = query + row_token.to(tl.int64) * query_stride + query_head * (KEY + REST)
    mask = is_row[:, None] & (key_columns < KEY)[None, :]
    queries = tl.load(row_query[:, None] + key_columns[None, :], mask=mask, other=0.0)
    if FORMAT != PLAIN and queries.dtype != tl.float32:
        queries = queries.to(tl.float16)  # as what they meet
    query_rest = queries
    if REST > 0:
        query_rest = tl.load(row_query[:, None] + KEY + rest_columns[None, :], mask=is_row[:, None], other=0.0)

    first_position, last_position = prefix_len + first_token, prefix_len + end_token - 1
    begin_block, end_block = 0, last_position // BLOCK_N + 1
    close_block = (first_position + 1) // BLOCK_N  # from here on not every row sees every cell
    open_block = 0
    if HAS_WINDOW:
        begin_block = tl.maximum(first_position - window + 1, 0) // BLOCK_N
        open_block = tl.minimum(tl.maximum((last_position - window + BLOCK_N) // BLOCK_N, begin_block), end_block)
        close_block = tl.maximum(close_block, open_block)
    head_numbers, head_scales = numbers + head * number_head_stride, scales
    if FORMAT != PLAIN:
        head_scales = scales + head * scale_head_stride
    table = tables + sequence.to(tl.int64) * table_stride
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_VALUE), tl.float32)
    for part in tl.static_range(0 if HAS_WINDOW else 1, 3):
        part_table = table
        part_begin = begin_block if part == 0 else open_block if part == 1 else close_block
        part_end = open_block if part == 0 else close_block if part == 1 else end_block
        if HAS_LISTS:
            if part == 1:
                part_table = lists + tile.to(tl.int64) * list_stride + head * list_head_stride
                part_begin, part_end = 0, tl.load(list_lens + tile * list_len_stride + head)
            else:
                part_begin = first_position // BLOCK_N
        acc, total, highest = attend(
            queries,
            query_rest,
            acc,
            total,
            highest,
            head_numbers,
            head_scales,
            part_table,
            part_begin,
            part_end,
            row_positions,
            row_positions.to(tl.int64),
            prefix_len,
            context_len,
            window,
            number_stride,
            scale_stride,
            score_scale,
            softcap,
            KEY,
            REST,
            VALUE,
            BLOCK_VALUE,
            BLOCK_N,
            CELL,
            SHARED,
            FORMAT,
            part != 1,
            HAS_WINDOW,
            False,
            HAS_SOFTCAP,
            STAGES,
        )
    sink = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + query_head)
    factor, log_sum = finish(total, highest, sink)
    row = row_token.to(tl.int64) * (KV_HEADS * GROUP) + query_head
    mask = is_row[:, None] & (value_columns < VALUE)[None, :]
    tl.store(output + row[:, None] * VALUE + value_columns[None, :], (acc * factor[:, None]).to(output.dtype.element_ty), mask=mask)
    tl.store(log_sums + row, log_sum, mask=is_row)
