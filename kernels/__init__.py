"""The door to the tensor functions: one set of signatures (`Backend`), Triton on CUDA, the CPU's own elsewhere.

`reference` says in plain PyTorch what each must compute. Knows nothing of requests, checkpoints or the network, and imports nothing of the
services but their standard-library words.
"""

from kernels.backend import Backend, BackendName, as_capturable, backend_for, backend_of
from kernels.gumbel import gumbel_noise
from kernels.kv_layout import KVFormat, KVLayout
from kernels.linear import Linear

__all__ = [
    "Backend",
    "BackendName",
    "KVFormat",
    "KVLayout",
    "Linear",
    "as_capturable",
    "backend_for",
    "backend_of",
    "gumbel_noise",
]
