"""The KV block: how the bytes of a block are laid out, for engine, kernels and (as numbers) the wire.

A pool is one tensor [num_blocks, num_layers, num_kv_heads, block_size, 2 * head_dim] in the pool's dtype: block-major, so that a block is
one contiguous piece over all layers (one descriptor moves it); head-major inside, so that unequal tensor parallelism slices by head;
each token's K and V side by side. Source: vLLM's BLHNC layout (RFC 42082), K and V fused in the last dimension.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """Shape of one KV group on one rank; `block_size` in tokens."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        return (self.num_layers, self.num_kv_heads, self.block_size, 2 * self.head_dim)

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.num_kv_heads * self.block_size * 2 * self.head_dim * self.dtype.itemsize

    def allocate(self, num_blocks: int, device: torch.device) -> torch.Tensor:
        """A zeroed pool: blocks travel whole, and a partly filled one must not carry what the memory held before."""
        return torch.zeros(num_blocks, *self.block_shape, dtype=self.dtype, device=device)
