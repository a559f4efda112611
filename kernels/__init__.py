"""The door to the tensor functions: one set of signatures, whatever computes them.

Today that is PyTorch on the CPU (`cpu_attention`, `cpu_linear`); `reference` says in plain PyTorch what each must compute.
Knows nothing of requests, checkpoints or the network, and imports nothing of the services but their standard-library words.
"""

from kernels.cpu_attention import AttentionPlan, kv_cells, paged_attention, plan_attention, write_kv
from kernels.cpu_linear import Linear
from kernels.elementwise import apply_rope, rms_norm, silu_and_mul
from kernels.gumbel import gumbel_noise
from kernels.kv_layout import KVLayout

__all__ = [
    "AttentionPlan",
    "KVLayout",
    "Linear",
    "apply_rope",
    "gumbel_noise",
    "kv_cells",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "silu_and_mul",
    "write_kv",
]
