"""Matrix products that give a row the same bits whatever rows are computed with it: tiles of one size, sums in one order.

A library takes other tiles, and splits sums otherwise, for 1 row than for 1,000; a token then depends on its batch. Here every tile is
multiplied by the same instructions, from the first number of a row to its last. Source: Thinking Machines Lab, "Defeating Nondeterminism
in LLM Inference" (He 2025), for the cause; grouped order of tiles: Triton's tutorial on matrix products.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl

TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
# fp32 is multiplied number by number, from registers.
FP32_TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
TILES_TOGETHER = 8  # of rows, which share columns of the weight while those are in the cache


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x,
    weight,
    bias,
    output,
    num_rows,
    in_features,
    out_features,
    x_batch_stride,
    x_row_stride,
    weight_batch_stride,
    weight_row_stride,
    weight_column_stride,
    output_batch_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Programs (tile, batch): a tile of x [B, M, K] times weight [B, N, K] transposed, plus bias [N]; IS_WHOLE: BLOCK_K divides K."""
    batch = tl.program_id(1).to(tl.int64)
    num_row_tiles, num_column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    first_row_tile = tl.program_id(0) // (TOGETHER * num_column_tiles) * TOGETHER
    height = tl.minimum(num_row_tiles - first_row_tile, TOGETHER)
    index = tl.program_id(0) % (TOGETHER * num_column_tiles)
    row = (first_row_tile + index % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = index // height * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = row < num_rows, column < out_features
    number = tl.arange(0, BLOCK_K)
    rows = x + batch * x_batch_stride + row.to(tl.int64)[:, None] * x_row_stride + number[None, :]
    columns = weight + batch * weight_batch_stride + column.to(tl.int64)[:, None] * weight_row_stride
    columns += number[None, :] * weight_column_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, in_features, BLOCK_K):
        row_mask, column_mask = is_row[:, None], is_column[:, None]
        if not IS_WHOLE:
            row_mask, column_mask = (
                row_mask & (first + number < in_features)[None, :],
                column_mask & (first + number < in_features)[None, :],
            )
        left = tl.load(rows, mask=row_mask, other=0.0)
        right = tl.load(columns, mask=column_mask, other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
        rows += BLOCK_K
        columns += BLOCK_K * weight_column_stride
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    target = output + batch * output_batch_stride + row.to(tl.int64)[:, None] * out_features + column[None, :]
    tl.store(target, acc.to(output.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def batched_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [B, M, K] times weight [B, N, K] transposed, plus bias [N]: [B, M, N] in dtype or x's; sums are fp32. Rows of x are contiguous."""
    batch, num_rows, in_features = x.shape
    out_features = weight.shape[1]
    assert x.stride(2) == 1 and weight.dtype == x.dtype
    output = torch.empty(batch, num_rows, out_features, dtype=dtype or x.dtype, device=x.device)
    tile = FP32_TILE if x.dtype == torch.float32 else TILE
    num_tiles = triton.cdiv(num_rows, tile["BLOCK_M"]) * triton.cdiv(out_features, tile["BLOCK_N"])
    if num_rows:
        linear_kernel[(num_tiles, batch)](
            x,
            weight,
            bias,
            output,
            num_rows,
            in_features,
            out_features,
            # Of one batch it is not used, and would be another kind of number for other numbers of rows.
            x.stride(0) if batch > 1 else 0,
            x.stride(1),
            *weight.stride(),
            output.stride(0) if batch > 1 else 0,
            IS_WHOLE=in_features % tile["BLOCK_K"] == 0,
            HAS_BIAS=bias is not None,
            TOGETHER=TILES_TOGETHER,
            **tile,
        )
    return output


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N]; see batched_linear."""
    return batched_linear(x[None], weight[None], bias, dtype)[0]
