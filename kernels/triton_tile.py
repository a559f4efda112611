"""What the attention kernels do with KV blocks: load them, score them, add them to a running softmax. Device functions only.

A cell of a block holds the key and the value of one token and KV head, in one of kv_layout's formats. Quantized numbers are not scaled
themselves: the scale of a key multiplies its column of scores, that of a value its column of weights. They become fp16, which is one
conversion, and never bf16, which is three (fp32 where queries are). Source of the running softmax: Milakov and Gimelshein 2018; of scales
on scores and weights: SageAttention (Zhang et al. 2024), vLLM's per-token-head cache.

Everything in these kernels also runs in Triton's interpreter, which has no bf16 arithmetic: tests use fp16 and fp32.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

# The values of KVFormat: a kernel may read no global that is not a constexpr.
PLAIN, FP8, INT8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_numbers(
    cells,
    keep,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CELL: tl.constexpr,
    FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Numbers OFFSET … OFFSET + WIDTH of the cells of a block, [N, BLOCK], zeros after them and, if MASKED, where `keep` [N] is false.

    cells   the block's first cell of one layer and head; CELL elements from one to the next, of which an INT4 one has two numbers
    WIDE    what quantized numbers become
    """
    PACKED: tl.constexpr = 2 if FORMAT == INT4 else 1
    tokens = tl.arange(0, keep.shape[0])
    columns = tl.arange(0, BLOCK // PACKED)
    pointers = cells + OFFSET // PACKED + tokens[:, None] * CELL + columns[None, :]
    ZERO: tl.constexpr = 0x88 if FORMAT == INT4 else 0.0
    if MASKED:
        mask = keep[:, None] & (columns < WIDTH // PACKED)[None, :] if BLOCK != WIDTH else keep[:, None]
        stored = tl.load(pointers, mask=mask, other=ZERO)
    elif BLOCK != WIDTH:
        stored = tl.load(pointers, mask=(columns < WIDTH // PACKED)[None, :], other=ZERO)
    else:
        stored = tl.load(pointers)
    if FORMAT == INT4:
        low, high = (stored & 15).to(tl.int8) - 8, (stored >> 4).to(tl.int8) - 8
        numbers = tl.interleave(low.to(WIDE), high.to(WIDE))
    elif FORMAT == PLAIN:
        numbers = stored
    else:
        numbers = stored.to(WIDE)
    return numbers


@triton.jit
def attend(
    query,
    query_rest,
    output,
    total,
    highest,
    numbers,
    scales,
    table,
    first_block,
    end_block,
    row_positions,
    row_ancestors,
    prefix_len,
    context_len,
    window,
    number_stride,
    scale_stride,
    score_scale,
    softcap,
    KEY: tl.constexpr,
    REST: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CELL: tl.constexpr,
    SHARED: tl.constexpr,
    FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds blocks first_block … end_block - 1 of a sequence to the running softmax of its rows.

    query            [M, BLOCK_KEY] of the first KEY numbers of each row; query_rest [M, REST] of the others of a shared cell
    output           [M, BLOCK_VALUE], sums of weighted values, to be divided by total [M]; weights are 2 ** (score - highest [M])
    numbers, scales  of the pool, at the layer and head; a block is number_stride or scale_stride elements after the one before it
    table            block ids of the sequence
    row_positions    [M] of each row's token; row_ancestors [M]: bit i says that it sees token i after prefix_len
    MASKED           False promises that every row sees every cell of these blocks
    """
    tokens = tl.arange(0, BLOCK_N)
    for block in tl.range(first_block, end_block, num_stages=STAGES):
        block_id = tl.load(table + block).to(tl.int64)
        cells = numbers + block_id * number_stride
        positions = block * BLOCK_N + tokens
        # Cells after the context hold what their last owner left: masking scores is not enough, for 0 * NaN is NaN.
        keep = positions < context_len
        keys = load_numbers(cells, keep, 0, KEY, query.shape[1], CELL, FORMAT, MASKED, query.dtype)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if REST > 0:
            rest = load_numbers(cells, keep, KEY, REST, REST, CELL, FORMAT, MASKED, query.dtype)
            scores = tl.dot(query_rest, tl.trans(rest), scores, input_precision="ieee")
        if FORMAT != PLAIN:
            pair = scales + block_id * scale_stride + tokens * 2
            scores *= tl.load(pair, mask=keep, other=0.0).to(tl.float32)[None, :]
        if HAS_SOFTCAP:
            capped = scores * (score_scale / softcap)
            scores = (2.0 / (1.0 + tl.exp2(-2.0 * LOG2_E * capped)) - 1.0) * (softcap * LOG2_E)
        else:
            scores = scores * (score_scale * LOG2_E)
        if MASKED:
            after = positions - prefix_len
            if HAS_TREE:
                in_tree = ((row_ancestors[:, None] >> tl.maximum(after, 0).to(tl.int64)[None, :]) & 1) != 0
                visible = ((after < 0)[None, :] | in_tree) & keep[None, :]
            else:
                visible = positions[None, :] <= row_positions[:, None]
            if HAS_WINDOW:
                visible = visible & (row_positions[:, None] - positions[None, :] < window)
            scores = tl.where(visible, scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet: -inf less -inf would be NaN.
        base = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weights, 1)
        highest = raised
        if SHARED:
            values = keys
        else:
            values = load_numbers(cells, keep, KEY, VALUE, BLOCK_VALUE, CELL, FORMAT, MASKED, query.dtype)
        if FORMAT != PLAIN:
            weights *= tl.load(pair + 1, mask=keep, other=0.0).to(tl.float32)[None, :]
        output = tl.dot(weights.to(values.dtype), values, output * fade[:, None], input_precision="ieee")
    return output, total, highest


@triton.jit
def finish(total, highest, sink_scores):
    """What the rows' sums of weighted values are to be multiplied by, and log2 of their sums of 2 ** score.

    sink_scores   [M] of one more token, without a value, in natural units; -inf adds nothing
    """
    sink = sink_scores * LOG2_E
    raised = tl.maximum(highest, sink)
    base = tl.where(raised == float("-inf"), 0.0, raised)
    fade = tl.exp2(highest - base)
    total = total * fade + tl.exp2(sink - base)
    divisor = tl.where(total == 0.0, 1.0, total)
    return fade / divisor, tl.where(total == 0.0, float("-inf"), base + tl.log2(divisor))
