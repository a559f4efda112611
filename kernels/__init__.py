"""The door to the tensor functions: one set of signatures, whatever computes them.

Today that is the CPU (`cpu_…`), by PyTorch's matrix products and loops that Numba compiles; `reference` says in plain PyTorch what each
must compute.
Knows nothing of requests, checkpoints or the network, and imports nothing of the services but their standard-library words.
"""

from kernels.cpu_attention import AttentionPlan, paged_attention, plan_attention
from kernels.cpu_elementwise import add_rms_norm, rms_norm, rope_and_write_kv, silu_and_mul
from kernels.cpu_linear import Linear
from kernels.gumbel import gumbel_noise
from kernels.kv_layout import KVLayout

__all__ = [
    "AttentionPlan",
    "KVLayout",
    "Linear",
    "add_rms_norm",
    "gumbel_noise",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rope_and_write_kv",
    "silu_and_mul",
]
