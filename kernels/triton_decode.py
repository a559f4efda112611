"""Attention of few new tokens per sequence over its whole paged context, in one launch of one shape: decode, verify and MLA's decode.

The work is a line of units, block after block, KV head after KV head, sequence after sequence. Each program of a fixed grid takes an equal
piece of the line, wherever that begins or ends: whatever the lengths are, all are busy equally long, and one CUDA graph serves every batch
of so many rows. A program that has seen all blocks of a (sequence, head) writes the result; where several have, each leaves its part, and
whoever comes last merges them, in the line's order. All lengths are read on the device.

A row of a program's tile is one query head of one new token: the query heads of a KV head read its keys together, and so do the draft
tokens that speculation verifies (`ancestors` says which of them each one sees). In batch-invariant mode a unit is `CHUNK` blocks from the
first one seen on and each unit leaves its part, so that a sequence's sums do not depend on where others begin.

Specification: reference.paged_attention. Source: split-KV decoding (Dao et al. 2023), Stream-K (Osama et al. 2023) for the equal pieces.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.triton_tile import PLAIN, attend, finish


@triton.jit
def _num_units(context_len, query_len, window, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Of one sequence, head and tile of rows."""
    first = tl.maximum(context_len - query_len - window + 1, 0) // BLOCK_N if HAS_WINDOW else context_len * 0
    num_blocks = (context_len + BLOCK_N - 1) // BLOCK_N - first
    return tl.where(query_len > 0, (num_blocks + CHUNK - 1) // CHUNK, 0)


@triton.jit(do_not_specialize=["num_sequences", "tiles_per_sequence"])
def plan_units(
    starts,
    context_lens,
    query_starts,
    num_sequences,
    window,
    tiles_per_sequence,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """starts [S + 1]: where each sequence's units begin on the line; one program."""
    index = tl.arange(0, CAPACITY)
    there = index < num_sequences
    query_lens = tl.load(query_starts + index + 1, mask=there, other=0) - tl.load(query_starts + index, mask=there, other=0)
    units = _num_units(tl.load(context_lens + index, mask=there, other=0), query_lens, window, BLOCK_N, CHUNK, HAS_WINDOW)
    ends = tl.cumsum(units * tiles_per_sequence, 0)
    tl.store(starts, 0)
    tl.store(starts + 1 + index, ends, mask=there)


@triton.jit(do_not_specialize=["num_sequences", "num_tiles", "table_stride"])
def decode_attention(
    query,
    numbers,
    scales,
    tables,
    context_lens,
    query_starts,
    starts,
    sinks,
    ancestors,
    tree_positions,
    parts,
    part_sums,
    arrived,
    output,
    log_sums,
    num_sequences,
    num_tiles,
    table_stride,
    table_head_stride,
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
    PART_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CELL: tl.constexpr,
    SHARED: tl.constexpr,
    FORMAT: tl.constexpr,
    CHUNK: tl.constexpr,
    INVARIANT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program of the grid. Pointers to `numbers` and `scales` are at the layer; see kernels.triton_backend for the others."""
    pid = tl.program_id(0).to(tl.int32)
    num_units = tl.load(starts + num_sequences)
    share = tl.maximum((num_units + tl.num_programs(0) - 1) // tl.num_programs(0), 1)
    unit = pid * share
    end = tl.minimum(unit + share, num_units)
    sequence = _last_at_most(starts, num_sequences, unit)
    rows = tl.arange(0, BLOCK_M)
    key_columns, value_columns = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE)
    rest_columns = tl.arange(0, REST if REST > 0 else 16)
    while unit < end:
        sequence_end = tl.load(starts + sequence + 1)
        while sequence_end <= unit:  # sequences without units
            sequence += 1
            sequence_end = tl.load(starts + sequence + 1)
        sequence_begin = tl.load(starts + sequence)
        context_len = tl.load(context_lens + sequence)
        query_start = tl.load(query_starts + sequence)
        query_len = tl.load(query_starts + sequence + 1) - query_start
        prefix_len = context_len - query_len
        units_each = (sequence_end - sequence_begin) // (KV_HEADS * num_tiles)
        pair = (unit - sequence_begin) // units_each
        pair_begin = sequence_begin + pair * units_each
        pair_end = pair_begin + units_each
        piece_end = unit + 1 if INVARIANT else tl.minimum(end, pair_end)
        head, tile = pair // num_tiles, pair % num_tiles

        token = (tile * BLOCK_M + rows) // GROUP
        query_head = head * GROUP + (tile * BLOCK_M + rows) % GROUP
        is_row = token < query_len
        row_token = query_start + tl.where(is_row, token, 0)
        row_query = query + row_token.to(tl.int64) * query_stride + query_head * (KEY + REST)
        row_positions, row_ancestors = prefix_len + token, token.to(tl.int64)
        if HAS_TREE:
            row_positions = tl.load(tree_positions + row_token)
            row_ancestors = tl.load(ancestors + row_token)
        mask = is_row[:, None] & (key_columns < KEY)[None, :]
        queries = tl.load(row_query[:, None] + key_columns[None, :], mask=mask, other=0.0)
        if FORMAT != PLAIN and queries.dtype != tl.float32:
            queries = queries.to(tl.float16)  # as what they meet
        query_rest = queries
        if REST > 0:
            query_rest = tl.load(row_query[:, None] + KEY + rest_columns[None, :], mask=is_row[:, None], other=0.0)

        first_seen = tl.maximum(prefix_len - window + 1, 0) // BLOCK_N if HAS_WINDOW else 0
        num_blocks = (context_len + BLOCK_N - 1) // BLOCK_N
        begin_block = first_seen + (unit - pair_begin) * CHUNK
        end_block = tl.minimum(first_seen + (piece_end - pair_begin) * CHUNK, num_blocks)
        # Between these every row sees every cell.
        open_block = begin_block
        if HAS_WINDOW:
            all_see = tl.maximum(context_len - window + BLOCK_N - 1, 0) // BLOCK_N
            if INVARIANT:  # where a token's window begins with a block, that is masked for others of its run
                all_see = tl.maximum(all_see, first_seen + 1)
            open_block = tl.minimum(tl.maximum(all_see, begin_block), end_block)
        close_block = tl.minimum(tl.maximum(prefix_len // BLOCK_N, open_block), end_block)
        # After two loops that share so many sums ptxas waits for every single product: a large latent tile has one, which masks.
        ONE_LOOP: tl.constexpr = SHARED and BLOCK_M > 32
        if ONE_LOOP:
            close_block = begin_block

        total = tl.zeros((BLOCK_M,), tl.float32)
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_VALUE), tl.float32)
        head_numbers, head_scales = numbers + head * number_head_stride, scales
        if FORMAT != PLAIN:
            head_scales = scales + head * scale_head_stride
        table = tables + sequence.to(tl.int64) * table_stride + head * table_head_stride
        for part in tl.static_range(2 if ONE_LOOP else 0 if HAS_WINDOW else 1, 3):
            acc, total, highest = attend(
                queries,
                query_rest,
                acc,
                total,
                highest,
                head_numbers,
                head_scales,
                table,
                begin_block if part == 0 else open_block if part == 1 else close_block,
                open_block if part == 0 else close_block if part == 1 else end_block,
                row_positions,
                row_ancestors,
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
                HAS_TREE,
                HAS_SOFTCAP,
                STAGES,
            )

        sink = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        if HAS_SINKS:
            sink = tl.load(sinks + query_head)
        row = row_token.to(tl.int64) * (KV_HEADS * GROUP) + query_head
        tile_output, output_row = output, row
        if SHARED and KV_HEADS == 1:
            # A pair's rows lie one after another, so no register need keep where each does while the latent's sums take half of them.
            tile_output, output_row = output + (query_start.to(tl.int64) * GROUP + tile * BLOCK_M) * VALUE, rows
        first_program = pair_begin // share
        num_parts = units_each if INVARIANT else (pair_end - 1) // share - first_program + 1
        if num_parts == 1:
            factor, log_sum = finish(total, highest, sink)
            mask = is_row[:, None] & (value_columns < VALUE)[None, :]
            result = (acc * factor[:, None]).to(output.dtype.element_ty)
            tl.store(tile_output + output_row[:, None] * VALUE + value_columns[None, :], result, mask=mask)
            tl.store(log_sums + row, log_sum, mask=is_row)
        else:
            # The first part of a pair is the last piece of its program, all others are the first ones of theirs.
            slot = unit if INVARIANT else 2 * pid + (unit == pair_begin).to(tl.int32)
            is_kept = rows < PART_ROWS
            tl.store(part_sums + slot * 2 * PART_ROWS + rows, total, mask=is_kept)
            tl.store(part_sums + slot * 2 * PART_ROWS + PART_ROWS + rows, highest, mask=is_kept)
            part_at = parts + slot.to(tl.int64) * PART_ROWS * BLOCK_VALUE + rows[:, None] * BLOCK_VALUE + value_columns[None, :]
            tl.store(part_at, acc, mask=is_kept[:, None])
            tl.debug_barrier()  # all of it is written before the count says so
            counter = arrived + (sequence * KV_HEADS * num_tiles + pair)
            if tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1:
                tl.debug_barrier()
                tl.store(counter, 0)
                first_slot = pair_begin if INVARIANT else 2 * first_program
                _merge(
                    parts,
                    part_sums,
                    first_slot,
                    num_parts,
                    sink,
                    is_row,
                    output_row,
                    tile_output,
                    row,
                    log_sums,
                    VALUE,
                    BLOCK_VALUE,
                    BLOCK_M,
                    PART_ROWS,
                    INVARIANT,
                )
        unit = piece_end


@triton.jit
def _merge(
    parts,
    part_sums,
    first_slot,
    num_parts,
    sink,
    is_row,
    output_row,
    tile_output,
    row,
    log_sums,
    VALUE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PART_ROWS: tl.constexpr,
    INVARIANT: tl.constexpr,
):
    """Writes the rows of a pair whose parts are all there, in the order of the line; some columns at a time, for registers are few."""
    rows = tl.arange(0, BLOCK_M)
    is_kept = rows < PART_ROWS
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for index in range(num_parts):
        highest_at = part_sums + _slot(first_slot, index, INVARIANT) * 2 * PART_ROWS + PART_ROWS + rows
        highest = tl.maximum(highest, tl.load(highest_at, mask=is_kept, other=float("-inf"), cache_modifier=".cg"))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    COLUMNS: tl.constexpr = min(BLOCK_VALUE, 128)
    for first_column in tl.static_range(0, BLOCK_VALUE, COLUMNS):
        columns = first_column + tl.arange(0, COLUMNS)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        for index in range(num_parts):
            slot = _slot(first_slot, index, INVARIANT)
            sums = part_sums + slot * 2 * PART_ROWS + rows
            weight = tl.exp2(tl.load(sums + PART_ROWS, mask=is_kept, other=float("-inf"), cache_modifier=".cg") - base)
            total += weight * tl.load(sums, mask=is_kept, other=0.0, cache_modifier=".cg")
            part_at = parts + slot.to(tl.int64) * PART_ROWS * BLOCK_VALUE + rows[:, None] * BLOCK_VALUE + columns[None, :]
            acc += weight[:, None] * tl.load(part_at, mask=is_kept[:, None], other=0.0, cache_modifier=".cg")
        factor, log_sum = finish(total, highest, sink)
        result = (acc * factor[:, None]).to(tile_output.dtype.element_ty)
        tl.store(tile_output + output_row[:, None] * VALUE + columns[None, :], result, mask=is_row[:, None] & (columns < VALUE)[None, :])
        if first_column == 0:
            tl.store(log_sums + row, log_sum, mask=is_row)


@triton.jit
def _slot(first_slot, index, INVARIANT: tl.constexpr):
    """Where the part with this index lies: of whole units one after another; else 1, 2, 4, 6 … slots after those of the first program."""
    if INVARIANT:
        slot = first_slot + index
    else:
        slot = first_slot + 2 * index + 1 // (1 + index)
    return slot


@triton.jit
def _last_at_most(starts, num_sequences, unit):
    """The last sequence whose units begin at `unit` or before it."""
    low, high = 0, num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= unit
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low
