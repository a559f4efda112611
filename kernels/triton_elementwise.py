"""Norms, SwiGLU and the merge of partial attentions by Triton: one pass over the data and one launch each.

Specification: the functions of the same names in reference.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, residual, weight, output, width, eps, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """One program for each row: x [T, H] plus, if there is one, the residual, which becomes the sum; the sum's norm times weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    numbers = tl.load(x + row * width + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total = numbers + tl.load(residual + row * width + column, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(residual.dtype.element_ty)
        tl.store(residual + row * width + column, rounded, mask=mask)
        numbers = rounded.to(tl.float32)
    factor = tl.math.rsqrt(tl.sum(numbers * numbers, 0) / width + eps)
    normed = numbers * factor * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * width + column, normed.to(output.dtype.element_ty), mask=mask)


@triton.jit
def activate_and_mul(gate_up, output, width, BLOCK: tl.constexpr, IS_GELU: tl.constexpr):
    """Programs (piece, row) of gate_up [T, 2 I]. tanh(x) is 2 sigmoid(2 x) - 1, which the interpreter has too."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    # 1.595769… is twice the square root of 2 / pi.
    activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if IS_GELU else gate)
    tl.store(output + row * width + column, (activated * up).to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def merge_attention(
    outputs, log_sums, output, log_sum, num_rows, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Programs of ROWS rows, a token's head each: outputs [PARTS, rows, WIDTH], weighted by 2 ** log_sums [PARTS, rows]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_row = row < num_rows
    mask = is_row[:, None] & (column < WIDTH)[None, :]
    offsets = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        highest = tl.maximum(highest, tl.load(log_sums + part * num_rows + row, mask=is_row, other=float("-inf")))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((ROWS,), tl.float32)
    merged = tl.zeros((ROWS, BLOCK), tl.float32)
    for part in tl.static_range(PARTS):
        weight = tl.exp2(tl.load(log_sums + part * num_rows + row, mask=is_row, other=float("-inf")) - base)
        total += weight
        merged += tl.load(outputs + part * num_rows * WIDTH + offsets, mask=mask, other=0.0).to(tl.float32) * weight[:, None]
    divisor = tl.where(total > 0.0, total, 1.0)
    tl.store(output + offsets, (merged / divisor[:, None]).to(output.dtype.element_ty), mask=mask)
    tl.store(log_sum + row, tl.where(total > 0.0, base + tl.log2(divisor), float("-inf")), mask=is_row)
