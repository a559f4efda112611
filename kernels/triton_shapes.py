"""What sizes tiles and grids have: as large as fits into the registers and the shared memory of each generation of GPUs.

What fits is not reckoned but compiled: tests/kernels/compile_all.py says what spills. Knows layouts, no tensors.
"""

from functools import lru_cache

import torch

from kernels.kv_layout import KVFormat, KVLayout

INTERPRETED_PROGRAMS = 5  # enough to cut most work somewhere


@lru_cache
def num_programs(device: torch.device) -> int:
    """Programs of a grid that fills the device."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def capability(device: torch.device) -> int:
    """Compute capability times ten; without a GPU that of Hopper."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def prefill_rows(layout: KVLayout, compute_capability: int) -> int:
    """Rows of a prefill program's tile: as many as do not spill registers (tests/kernels/compile_all.py says what does)."""
    has_large_tiles = 90 <= compute_capability < 120  # Hopper and its successors for data centres
    if layout.value_dim > 128:
        return 64 if layout.format is KVFormat.PLAIN and has_large_tiles else 32
    # Columns that only fill up a power of two are masked, which takes registers.
    is_filled_up = layout.value_dim & (layout.value_dim - 1) > 0
    return 64 if not has_large_tiles or (is_filled_up and layout.format is KVFormat.INT4) else 128


def decode_warps(rows: int, layout: KVLayout) -> int:
    """Warps of a decode program whose tile has so many rows; more of them have more registers, and wait for each other more often."""
    return 8 if layout.value_dim > 128 or rows >= 64 or (rows >= 32 and layout.format is not KVFormat.PLAIN) else 4


def tile_rows(rows: int, layout: KVLayout, compute_capability: int, *, invariant: bool = False) -> int:
    """Rows of a decode program's tile for so many query heads and tokens of one KV head.

    64 of more than 128 numbers have room on Hopper alone, for latents, in two bytes each: its products take the queries from shared memory.
    64 of quantized ones nearly have: they would spill 8 to 32 bytes.

    invariant   as many for one token as for a block of them: tiles of other sizes are multiplied by other instructions
    """
    has_large_tiles = layout.value_dim <= 128 and layout.format is KVFormat.PLAIN
    if layout.is_latent:
        has_large_tiles = 90 <= compute_capability < 100 and layout.dtype.itemsize == 2
    most = 64 if has_large_tiles else 32
    return most if invariant else min(most, max(16, 1 << (rows - 1).bit_length()))
