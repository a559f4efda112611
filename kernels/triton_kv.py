"""What fills KV blocks and moves them: norm, rotation, quantization and the paged write in one launch; blocks gathered and converted.

Numbers are quantized exactly as kv_cells.quantize does, bit for bit: divisions are IEEE's, nothing is fused into a multiply-add, and fp8
is rounded by hand, for Triton's interpreter rounds some numbers to half of what they are.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.triton_tile import FP8, INT4, INT8, PLAIN, load_numbers


@triton.jit
def largest_of(rows):
    """The largest magnitude of each row; NaN where a number is, which a maximum passes over."""
    is_nan = rows != rows
    largest = tl.max(tl.where(is_nan, 0.0, tl.abs(rows)), 1)
    return tl.where(tl.max(is_nan.to(tl.int32), 1) > 0, float("nan"), largest)


@triton.jit
def scale_of(largest, FORMAT: tl.constexpr):
    """fp16 scales for rows whose largest magnitudes these are."""
    most = largest * 0.0 + (448.0 if FORMAT == FP8 else 127.0 if FORMAT == INT8 else 7.0)
    return tl.math.div_rn(largest, most).to(tl.float16)


@triton.jit
def encode(rows, scale, FORMAT: tl.constexpr):
    """fp32 rows [M, W] as the format stores them; of INT4 pairs [M, W / 2]."""
    MOST: tl.constexpr = 448.0 if FORMAT == FP8 else 127.0 if FORMAT == INT8 else 7.0
    divisor = scale.to(tl.float32)[:, None]
    scaled = tl.math.div_rn(rows, tl.where(divisor == 0.0, 1.0, divisor) + rows * 0.0)
    scaled = tl.where((divisor == 0.0) | (scaled != scaled), 0.0, scaled)
    scaled = tl.minimum(tl.maximum(scaled, -MOST), MOST)
    if FORMAT == FP8:
        # Three bits of mantissa, ties to even; below 2 ** -6 multiples of 2 ** -9, which adding a large number rounds to.
        bits = scaled.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
        small = (scaled + 24576.0) - 24576.0
        stored = tl.where(tl.abs(scaled) < 0.015625, small, normal).to(tl.float8e4nv)
    else:
        whole = ((scaled + 12582912.0) - 12582912.0).to(tl.int8)
        if FORMAT == INT4:
            low, high = tl.split(tl.reshape((whole + 8).to(tl.uint8), (rows.shape[0], rows.shape[1] // 2, 2)))
            stored = low | (high << 4)
        else:
            stored = whole
    return stored


@triton.jit(do_not_specialize=["num_tokens"])
def rope_and_write_kv(
    qkv,
    query,
    numbers,
    scales,
    positions,
    slots,
    cosines,
    sines,
    query_norm,
    key_norm,
    num_tokens,
    eps,
    number_stride,
    number_head_stride,
    scale_stride,
    scale_head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CELL: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Programs (tokens, head of qkv [T, Hq + 2 Hk, D]): queries are normed, rotated, returned; keys stored instead; values just stored."""
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_HALF)
    is_token, is_column = token < num_tokens, column < HALF
    mask = is_token[:, None] & is_column[None, :]
    source = qkv + (token.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head)[:, None] * (2 * HALF) + column[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if HAS_NORM:
            weight = query_norm
            if head >= HEADS:
                weight = key_norm
            mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2.0 * HALF)
            factor = tl.math.rsqrt(mean + eps)[:, None]
            first = first * factor * tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
            second = second * factor * tl.load(weight + HALF + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        position = tl.load(positions + token, mask=is_token, other=0)
        angle = position[:, None] * HALF + column[None, :]
        cosine, sine = tl.load(cosines + angle, mask=mask, other=0.0), tl.load(sines + angle, mask=mask, other=0.0)
        rotated = first * cosine - second * sine
        second = second * cosine + first * sine
        first = rotated
    if head < HEADS:
        returned_at = query + (token.to(tl.int64) * HEADS + head)[:, None] * (2 * HALF) + column[None, :]
        tl.store(returned_at, first.to(query.dtype.element_ty), mask=mask)
        tl.store(returned_at + HALF, second.to(query.dtype.element_ty), mask=mask)
    else:
        is_value = head >= HEADS + KV_HEADS
        kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
        slot = tl.load(slots + token, mask=is_token, other=0)
        cells = numbers + slot // BLOCK_N * number_stride + kv_head * number_head_stride + slot % BLOCK_N * CELL
        PACKED: tl.constexpr = 2 if FORMAT == INT4 else 1
        cells += tl.where(is_value, 2 * HALF // PACKED, 0)
        if FORMAT == PLAIN:
            stored_first, stored_second = first.to(numbers.dtype.element_ty), second.to(numbers.dtype.element_ty)
        else:
            largest = tl.maximum(largest_of(first), largest_of(second), propagate_nan=tl.PropagateNan.ALL)
            scale = scale_of(largest, FORMAT)
            pair = scales + slot // BLOCK_N * scale_stride + kv_head * scale_head_stride + slot % BLOCK_N * 2
            tl.store(pair + tl.where(is_value, 1, 0), scale, mask=is_token)
            stored_first, stored_second = encode(first, scale, FORMAT), encode(second, scale, FORMAT)
        stored_column = tl.arange(0, BLOCK_HALF // PACKED)
        stored_mask = is_token[:, None] & (stored_column < HALF // PACKED)[None, :]
        stored_at = cells[:, None] + stored_column[None, :]
        tl.store(stored_at, stored_first, mask=stored_mask)
        tl.store(stored_at + HALF // PACKED, stored_second, mask=stored_mask)


@triton.jit(do_not_specialize=["num_tokens"])
def rope_and_write_latent(
    query,
    cell,
    numbers,
    positions,
    slots,
    cosines,
    sines,
    norm,
    num_tokens,
    eps,
    number_stride,
    HEADS: tl.constexpr,
    QUERY: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Programs (tokens, head): the last 2 HALF numbers of each of HEADS heads of query [T, HEADS, QUERY] are rotated in place; of one more
    head, cell [T, LATENT + 2 HALF], the first LATENT are normed, the others rotated, all stored."""
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_HALF)
    is_token, is_column = token < num_tokens, column < HALF
    mask = is_token[:, None] & is_column[None, :]
    row = token.to(tl.int64)
    target = query + (row * HEADS + head) * QUERY + (QUERY - 2 * HALF)
    source = target
    if head == HEADS:
        slot = tl.load(slots + token, mask=is_token, other=0)
        target = numbers + slot // BLOCK_N * number_stride + slot % BLOCK_N * (LATENT + 2 * HALF)
        source = cell + row * (LATENT + 2 * HALF)
        latent_column = tl.arange(0, BLOCK_LATENT)
        is_latent = latent_column < LATENT
        latent_mask = is_token[:, None] & is_latent[None, :]
        latent = tl.load(source[:, None] + latent_column[None, :], mask=latent_mask, other=0.0).to(tl.float32)
        factor = tl.math.rsqrt(tl.sum(latent * latent, 1) / LATENT + eps)[:, None]
        latent = latent * factor * tl.load(norm + latent_column, mask=is_latent, other=0.0).to(tl.float32)[None, :]
        tl.store(target[:, None] + latent_column[None, :], latent.to(numbers.dtype.element_ty), mask=latent_mask)
        target, source = target + LATENT, source + LATENT
    first_at = source[:, None] + column[None, :]
    first = tl.load(first_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_at + HALF, mask=mask, other=0.0).to(tl.float32)
    angle = tl.load(positions + token, mask=is_token, other=0)[:, None] * HALF + column[None, :]
    cosine, sine = tl.load(cosines + angle, mask=mask, other=0.0), tl.load(sines + angle, mask=mask, other=0.0)
    stored_at = target[:, None] + column[None, :]
    tl.store(stored_at, (first * cosine - second * sine).to(numbers.dtype.element_ty), mask=mask)
    tl.store(stored_at + HALF, (second * cosine + first * sine).to(numbers.dtype.element_ty), mask=mask)


@triton.jit
def copy_heads(
    source,
    target,
    source_blocks,
    target_blocks,
    source_block_stride,
    source_layer_stride,
    target_block_stride,
    target_layer_stride,
    num_words,
    BLOCK: tl.constexpr,
):
    """Programs (block, layer, piece): num_words int32 of each layer of a block; heads that follow one another are one piece of memory.

    source_blocks, target_blocks   block ids; None: one after another
    """
    block, layer = tl.program_id(0), tl.program_id(1)
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    from_block = block if source_blocks is None else tl.load(source_blocks + block)
    to_block = block if target_blocks is None else tl.load(target_blocks + block)
    begin = source + from_block.to(tl.int64) * source_block_stride + layer * source_layer_stride
    end = target + to_block.to(tl.int64) * target_block_stride + layer * target_layer_stride
    tl.store(end + word, tl.load(begin + word, mask=word < num_words, other=0), mask=word < num_words)


@triton.jit
def convert_heads(
    source,
    source_scales,
    target,
    target_scales,
    source_blocks,
    target_blocks,
    source_block_stride,
    source_layer_stride,
    source_head_stride,
    source_scale_block_stride,
    source_scale_layer_stride,
    source_scale_head_stride,
    target_block_stride,
    target_layer_stride,
    target_head_stride,
    target_scale_block_stride,
    target_scale_layer_stride,
    target_scale_head_stride,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOURCE_CELL: tl.constexpr,
    TARGET_CELL: tl.constexpr,
    SOURCE_FORMAT: tl.constexpr,
    TARGET_FORMAT: tl.constexpr,
):
    """Programs (block, layer, head): one block of one head from a format to another. Arguments as of copy_heads."""
    block, layer, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    from_block = (block if source_blocks is None else tl.load(source_blocks + block)).to(tl.int64)
    to_block = (block if target_blocks is None else tl.load(target_blocks + block)).to(tl.int64)
    begin = source + from_block * source_block_stride + layer * source_layer_stride + head * source_head_stride
    end = target + to_block * target_block_stride + layer * target_layer_stride + head * target_head_stride
    from_scale, to_scale = source_scales, target_scales
    if SOURCE_FORMAT != PLAIN:
        from_scale = source_scales + from_block * source_scale_block_stride + layer * source_scale_layer_stride
        from_scale += head * source_scale_head_stride
    if TARGET_FORMAT != PLAIN:
        to_scale = target_scales + to_block * target_scale_block_stride + layer * target_scale_layer_stride
        to_scale += head * target_scale_head_stride
    _convert(begin, end, from_scale, to_scale, 0, KEY, BLOCK_KEY, BLOCK_N, SOURCE_CELL, TARGET_CELL, SOURCE_FORMAT, TARGET_FORMAT)
    if VALUE > 0:
        _convert(begin, end, from_scale, to_scale, KEY, VALUE, BLOCK_VALUE, BLOCK_N, SOURCE_CELL, TARGET_CELL, SOURCE_FORMAT, TARGET_FORMAT)


@triton.jit
def _convert(
    source,
    target,
    source_scales,
    target_scales,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOURCE_CELL: tl.constexpr,
    TARGET_CELL: tl.constexpr,
    SOURCE_FORMAT: tl.constexpr,
    TARGET_FORMAT: tl.constexpr,
):
    """Numbers OFFSET … OFFSET + WIDTH of a block's cells, all of its keys or all of its values."""
    tokens = tl.arange(0, BLOCK_N)
    PACKED: tl.constexpr = 2 if TARGET_FORMAT == INT4 else 1
    HALF: tl.constexpr = 1 if OFFSET > 0 else 0  # of a cell's two scales
    rows = load_numbers(source, tokens >= 0, OFFSET, WIDTH, BLOCK, SOURCE_CELL, SOURCE_FORMAT, False, tl.float32).to(tl.float32)
    if SOURCE_FORMAT != PLAIN:
        rows *= tl.load(source_scales + tokens * 2 + HALF).to(tl.float32)[:, None]
    if TARGET_FORMAT == PLAIN:
        stored = rows.to(target.dtype.element_ty)
    else:
        scale = scale_of(largest_of(rows), TARGET_FORMAT)
        tl.store(target_scales + tokens * 2 + HALF, scale)
        stored = encode(rows, scale, TARGET_FORMAT)
    columns = tl.arange(0, BLOCK // PACKED)
    cells = target + OFFSET // PACKED + tokens[:, None] * TARGET_CELL + columns[None, :]
    tl.store(cells, stored, mask=(columns < WIDTH // PACKED)[None, :])
