"""The tensor functions on the CPU: PyTorch's matrix products and loops that Numba compiles. Signatures: kernels.backend."""

import torch

from kernels.cpu_attention import paged_attention, plan_attention
from kernels.cpu_elementwise import activate_and_mul, add_rms_norm, rms_norm, rope_and_write_kv, rope_and_write_latent
from kernels.kv_cells import copy_blocks

__all__ = [
    "activate_and_mul",
    "add_rms_norm",
    "batched_linear",
    "copy_blocks",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rope_and_write_kv",
    "rope_and_write_latent",
]
INVARIANCE = ""


def batched_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See kernels.backend."""
    return torch.bmm(x, weight.transpose(1, 2))
