"""The KV block: how the bytes of a block are laid out, for engine, kernels and (as numbers) the wire.

A pool is one tensor, block-major, so that a block is one contiguous piece over all layers (one descriptor moves it); head-major inside, so
that unequal tensor parallelism slices by head; each token's K and V side by side, its *cell*:

    plain       [num_blocks, num_layers, num_kv_heads, block_size, cell numbers] in the pool's dtype
    quantized   [num_blocks, num_layers, num_kv_heads, head_bytes] uint8: block_size cells, then block_size pairs of fp16, the scales of
                each token's K and V

A number times its scale is what was stored: fp8 has e4m3 numbers up to 448, int8 whole ones up to 127, int4 up to 7, stored plus 8, two in
a byte, the lower half first. Source: vLLM's BLHNC layout (RFC 42082), K and V fused in the last dimension; scales within the block are
ours: one descriptor moves both.
"""

import enum
from dataclasses import dataclass
from hashlib import blake2b

import torch

# Raised when bytes of an equal layout come to mean something else.
LAYOUT_VERSION = 2
FINGERPRINT_BYTES = 32
SCALE_BYTES = 4  # of a cell: two fp16


class KVFormat(enum.Enum):
    """How the numbers of a cell are stored; kernels know them by value."""

    PLAIN = 0
    FP8 = 1
    INT8 = 2
    INT4 = 3


STORED = {KVFormat.FP8: torch.float8_e4m3fn, KVFormat.INT8: torch.int8, KVFormat.INT4: torch.uint8}
LARGEST = {KVFormat.FP8: 448.0, KVFormat.INT8: 127.0, KVFormat.INT4: 7.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """Shape of one KV group on one rank.

    block_size      tokens
    head_dim        numbers of a key
    value_head_dim  numbers of a value; None: as many
    is_latent       a cell is the key alone, and its first numbers are the value too: the latent of multi-head latent attention
    dtype           of plain numbers
    """

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype
    value_head_dim: int | None = None
    is_latent: bool = False
    format: KVFormat = KVFormat.PLAIN

    def __post_init__(self) -> None:
        assert self.format is KVFormat.PLAIN or not self.is_latent, "a latent has no scales"
        assert not self.is_latent or self.value_dim <= self.head_dim
        assert self.format is not KVFormat.INT4 or self.head_dim % 2 == self.value_dim % 2 == 0

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def cell_numbers(self) -> int:
        return self.head_dim if self.is_latent else self.head_dim + self.value_dim

    @property
    def cell_bytes(self) -> int:
        """Without scales."""
        if self.format is KVFormat.PLAIN:
            return self.cell_numbers * self.dtype.itemsize
        return self.cell_numbers // 2 if self.format is KVFormat.INT4 else self.cell_numbers

    @property
    def head_bytes(self) -> int:
        """Of one layer and head of a block."""
        return self.block_size * (self.cell_bytes + (0 if self.format is KVFormat.PLAIN else SCALE_BYTES))

    @property
    def block_shape(self) -> tuple[int, ...]:
        if self.format is KVFormat.PLAIN:
            return (self.num_layers, self.num_kv_heads, self.block_size, self.cell_numbers)
        return (self.num_layers, self.num_kv_heads, self.head_bytes)

    @property
    def pool_dtype(self) -> torch.dtype:
        return self.dtype if self.format is KVFormat.PLAIN else torch.uint8

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.num_kv_heads * self.head_bytes

    def allocate(self, num_blocks: int, device: torch.device) -> torch.Tensor:
        """A zeroed pool: blocks travel whole, and a partly filled one must not carry what the memory held before."""
        return torch.zeros(num_blocks, *self.block_shape, dtype=self.pool_dtype, device=device)

    def over(self, buffer: memoryview, num_blocks: int) -> torch.Tensor:
        """A pool in memory that others may share: zeroed, writable, at least num_blocks * block_bytes long. The tensor keeps it alive."""
        num_bytes = num_blocks * self.block_bytes
        assert not buffer.readonly and buffer.nbytes >= num_bytes
        count = num_bytes // self.pool_dtype.itemsize
        return torch.frombuffer(buffer, dtype=self.pool_dtype, count=count).view(num_blocks, *self.block_shape)

    def numbers(self, pool: torch.Tensor) -> torch.Tensor:
        """The pool's cells [num_blocks, num_layers, num_kv_heads, block_size, …] as they are stored: fp8, int8, or bytes of two int4."""
        if self.format is KVFormat.PLAIN:
            return pool
        cells = pool[..., : self.block_size * self.cell_bytes].view(STORED[self.format])
        return cells.view(*pool.shape[:3], self.block_size, self.cell_bytes)

    def scales(self, pool: torch.Tensor) -> torch.Tensor:
        """The scales [num_blocks, num_layers, num_kv_heads, block_size, 2] fp16 of K and V of a quantized pool."""
        assert self.format is not KVFormat.PLAIN
        return pool[..., self.block_size * self.cell_bytes :].view(torch.float16).view(*pool.shape[:3], self.block_size, 2)

    def fingerprint(self, model_fingerprint: bytes) -> bytes:
        """32 bytes that are equal where a block's bytes mean the same: model, shape and format, but not how many blocks there are."""
        digest = blake2b(digest_size=FINGERPRINT_BYTES, person=b"baton.kvlayout")
        numbers = (self.num_layers, self.num_kv_heads, self.block_size, self.head_dim, self.value_dim, self.is_latent, self.format.value)
        for part in (model_fingerprint, str(self.dtype).encode(), b"%d" % LAYOUT_VERSION, *(b"%d" % number for number in numbers)):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()
