"""The tensor functions on the CPU: PyTorch's matrix products and loops that Numba compiles. Signatures: kernels.backend."""

from kernels.cpu_attention import paged_attention, plan_attention
from kernels.cpu_elementwise import add_rms_norm, rms_norm, rope_and_write_kv, silu_and_mul
from kernels.kv_cells import copy_blocks

__all__ = [
    "add_rms_norm",
    "copy_blocks",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rope_and_write_kv",
    "silu_and_mul",
]
