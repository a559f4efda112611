"""The tensor functions on the CPU: PyTorch's matrix products and loops that Numba compiles. Signatures: kernels.backend."""

from kernels.cpu_attention import paged_attention, plan_attention
from kernels.cpu_elementwise import activate_and_mul, add_rms_norm, rms_norm, rope_and_write_kv, rope_and_write_latent
from kernels.kv_cells import copy_blocks

__all__ = [
    "activate_and_mul",
    "add_rms_norm",
    "copy_blocks",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rope_and_write_kv",
    "rope_and_write_latent",
]
