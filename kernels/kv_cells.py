"""Cells of KV blocks in plain PyTorch: what each format means; read, written and converted. The CPU serves with it, and it is the
specification of what other backends do with cells."""

from collections.abc import Sequence

import torch

from kernels.kv_layout import LARGEST, KVFormat, KVLayout


def quantize(numbers: torch.Tensor, form: KVFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] as a quantized format stores it, int4 in pairs [..., D / 2], and the scales [...] fp16, chosen by the largest magnitude.

    Numbers are divided by the scale as it is stored and rounded to the nearest, ties to even. NaN or infinity makes the scale so, and with
    it all that is read back.
    """
    wide = numbers.float()
    scale = (wide.abs().amax(-1) / LARGEST[form]).half()
    divisor = scale.float()[..., None]
    scaled = torch.where(divisor == 0.0, 0.0, wide / divisor).nan_to_num(0.0).clamp(-LARGEST[form], LARGEST[form])
    if form is KVFormat.FP8:
        return scaled.to(torch.float8_e4m3fn), scale
    whole = scaled.round()
    if form is KVFormat.INT8:
        return whole.to(torch.int8), scale
    pairs = (whole + 8.0).to(torch.uint8).view(*whole.shape[:-1], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, scale


def dequantize(stored: torch.Tensor, scale: torch.Tensor, form: KVFormat) -> torch.Tensor:
    """[..., D] fp32 of what quantize gave."""
    if form is KVFormat.INT4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
    return stored.float() * scale.float()[..., None]


def read_cells(pool: torch.Tensor, layout: KVLayout, layer: int, block_table: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [Hk, C, D] and values [Hk, C, Dv] fp32 of the cells of these blocks, one after another."""
    blocks = torch.tensor(block_table, dtype=torch.int64)
    cells = layout.numbers(pool)[:, layer].index_select(0, blocks).transpose(0, 1).flatten(1, 2)  # [Hk, C, …]
    if layout.is_latent:
        return cells.float(), cells[..., : layout.value_dim].float()
    keys, values = cells.tensor_split([cells.shape[-1] * layout.head_dim // layout.cell_numbers], dim=-1)
    if layout.format is KVFormat.PLAIN:
        return keys.float(), values.float()
    scales = layout.scales(pool)[:, layer].index_select(0, blocks).transpose(0, 1).flatten(1, 2)
    return dequantize(keys, scales[..., 0], layout.format), dequantize(values, scales[..., 1], layout.format)


def write_cells(pool: torch.Tensor, layout: KVLayout, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Stores key [T, Hk, D] and value [T, Hk, Dv] of one layer in the cells `slots` [T] (block_id * block_size + offset) of the pool.

    Of a latent the value is part of the key, and not looked at.
    """
    block, cell = slots // layout.block_size, slots % layout.block_size
    numbers = layout.numbers(pool)
    if layout.is_latent:
        numbers[block, layer, :, cell] = key.to(layout.dtype)
    elif layout.format is KVFormat.PLAIN:
        numbers[block, layer, :, cell] = torch.cat((key, value), dim=-1).to(layout.dtype)
    else:
        (keys, key_scale), (values, value_scale) = quantize(key, layout.format), quantize(value, layout.format)
        numbers.view(torch.uint8)[block, layer, :, cell] = torch.cat((keys.view(torch.uint8), values.view(torch.uint8)), dim=-1)
        layout.scales(pool)[block, layer, :, cell] = torch.stack((key_scale, value_scale), dim=-1)


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
    """Copies blocks between pools, heads of them only if asked to, converting where formats differ.

    source_blocks, target_blocks   [n] block ids; None: the pool's blocks from the first on. So a pool without free order is packed into, or
                                   unpacked from, one that has nothing else
    first_source_head, …           the KV heads that are copied, and where they go; None: all from there on
    """
    given = source_blocks if source_blocks is not None else target_blocks
    every = torch.arange(len(source) if given is None else len(given), device=source.device)
    heads = source_layout.num_kv_heads - first_source_head if num_heads is None else num_heads
    from_blocks = every if source_blocks is None else source_blocks.long()
    to_blocks = every if target_blocks is None else target_blocks.long()
    from_heads = slice(first_source_head, first_source_head + heads)
    to_heads = slice(first_target_head, first_target_head + heads)
    if source_layout.format is target_layout.format:
        target[to_blocks, :, to_heads] = source[from_blocks, :, from_heads].to(target.dtype)
        return
    for layer in range(source_layout.num_layers):
        cells = read_cells(source, source_layout, layer, from_blocks.tolist())
        shape = (heads, len(to_blocks), source_layout.block_size, -1)
        keys, values = (part[from_heads].reshape(shape).transpose(0, 1) for part in cells)  # [n, heads, N, D]
        numbers = target_layout.numbers(target)
        if target_layout.format is KVFormat.PLAIN:
            numbers[to_blocks, layer, to_heads] = torch.cat((keys, values), dim=-1).to(target_layout.dtype)
            continue
        (stored_keys, key_scale), (stored_values, value_scale) = (quantize(part, target_layout.format) for part in (keys, values))
        stored = torch.cat((stored_keys.view(torch.uint8), stored_values.view(torch.uint8)), dim=-1)
        numbers.view(torch.uint8)[to_blocks, layer, to_heads] = stored
        target_layout.scales(target)[to_blocks, layer, to_heads] = torch.stack((key_scale, value_scale), dim=-1)
