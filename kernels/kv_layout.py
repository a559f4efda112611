"""The KV block: how the bytes of a block are laid out, for engine, kernels and (as numbers) the wire.

A pool is one tensor [num_blocks, num_layers, num_kv_heads, block_size, 2 * head_dim] in the pool's dtype: block-major, so that a block is
one contiguous piece over all layers (one descriptor moves it); head-major inside, so that unequal tensor parallelism slices by head;
each token's K and V side by side. Source: vLLM's BLHNC layout (RFC 42082), K and V fused in the last dimension.
"""

from dataclasses import dataclass
from hashlib import blake2b

import torch

# Raised when bytes of an equal layout come to mean something else.
LAYOUT_VERSION = 1
FINGERPRINT_BYTES = 32


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

    def over(self, buffer: memoryview, num_blocks: int) -> torch.Tensor:
        """A pool in memory that others may share: zeroed, writable, at least num_blocks * block_bytes long. The tensor keeps it alive."""
        num_bytes = num_blocks * self.block_bytes
        assert not buffer.readonly and buffer.nbytes >= num_bytes
        return torch.frombuffer(buffer, dtype=self.dtype, count=num_bytes // self.dtype.itemsize).view(num_blocks, *self.block_shape)

    def fingerprint(self, model_fingerprint: bytes) -> bytes:
        """32 bytes that are equal where a block's bytes mean the same: model, shape and dtype, but not how many blocks there are."""
        digest = blake2b(digest_size=FINGERPRINT_BYTES, person=b"baton.kvlayout")
        numbers = (self.num_layers, self.num_kv_heads, self.block_size, self.head_dim)
        for part in (model_fingerprint, str(self.dtype).encode(), b"%d" % LAYOUT_VERSION, *(b"%d" % number for number in numbers)):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()
