"""The memory that a worker's KV blocks live in, and the same memory seen from another process of the host.

    KVMemory ── fd over a Unix socket (SCM_RIGHTS) ──▶ PeerMemory

The pool is a memfd: memory with a descriptor and without a name, so a process that is killed leaves nothing behind. Where the platform
has none, the pool is anonymous memory and cannot be shared. Knows nothing of transfers, nor of what the blocks hold.
"""

import bisect
import contextlib
import fcntl
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def read_host_id() -> str:
    """A name that processes under one kernel have in common; empty where there is none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


class KVRegion(NamedTuple):
    """Blocks of one size, one after another."""

    num_blocks: int
    block_bytes: int


class BlockMap:
    """Where each block is in memory that has one region after another; blocks are numbered through all of them."""

    def __init__(self, regions: Sequence[tuple[int, int]]) -> None:
        self.regions = tuple(KVRegion(*region) for region in regions)
        self.num_blocks = self.num_bytes = 0
        self._first_ids: list[int] = []
        self.starts: list[int] = []
        for num_blocks, block_bytes in self.regions:
            self._first_ids.append(self.num_blocks)
            self.starts.append(self.num_bytes)
            self.num_blocks += num_blocks
            self.num_bytes += num_blocks * block_bytes

    def place(self, block_id: int) -> slice:
        """Its bytes."""
        assert 0 <= block_id < self.num_blocks
        region = bisect.bisect(self._first_ids, block_id) - 1
        size = self.regions[region].block_bytes
        start = self.starts[region] + (block_id - self._first_ids[region]) * size
        return slice(start, start + size)

    def size(self, block_id: int) -> int:
        """How many bytes it has."""
        assert 0 <= block_id < self.num_blocks
        return self.regions[bisect.bisect(self._first_ids, block_id) - 1].block_bytes


class KVMemory:
    """Pools of blocks, each of them contiguous bytes, zeroed at first; a region for every KV group of the model.

    All of it is there from the start, which takes half a second per GiB. Memory that came page by page would be too little when the worker
    is busiest, and blocks would land in new pages at a seventh of the rate (measured: 1 GB/s, and 7 to 9 in pages that exist).

    fd        of the memfd; None: this pool cannot be mapped by others
    buffer    all bytes; an engine makes its tensor over it (torch.frombuffer)
    blocks    for each region [num_blocks, block_bytes] uint8, the same bytes
    """

    def __init__(self, regions: Sequence[tuple[int, int]]) -> None:
        """`regions`: how many blocks of how many bytes, one after another."""
        self.map = BlockMap(regions)
        self.pool_bytes = self.map.num_bytes
        self.fd: int | None = None
        if sys.platform == "linux":
            self.fd = os.memfd_create("baton-kv-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, self.pool_bytes)
            # Sealed, or whoever maps it would have to fear SIGBUS: a peer refuses a pool that can still shrink.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._mapping = mmap.mmap(self.fd, self.pool_bytes)
        else:
            self._mapping = mmap.mmap(-1, self.pool_bytes)
        self.buffer = memoryview(self._mapping)
        pool = np.frombuffer(self._mapping, dtype=np.uint8)
        pool[:: mmap.PAGESIZE] = 0
        self.blocks = [part.reshape(region) for part, region in zip(np.split(pool, self.map.starts[1:]), self.map.regions, strict=True)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def num_blocks(self) -> int:
        return self.map.num_blocks

    def block(self, block_id: int) -> memoryview:
        """The bytes of one block, writable."""
        return self.buffer[self.map.place(block_id)]

    def close(self) -> None:
        """Gives the descriptor back now, and the bytes with the last view of them: an engine's tensor may live longer than this object."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        del self.blocks
        with contextlib.suppress(BufferError):
            self.buffer.release()
            self._mapping.close()


class PeerMemory:
    """Another process's pools, writable: `pool` is all their bytes, uint8."""

    def __init__(self, fd: int, regions: Sequence[tuple[int, int]]) -> None:
        """Takes `fd` over and closes it. Raises OSError when it is not of that size, or memory that its owner could still cut short."""
        self.map = BlockMap(regions)
        pool_bytes = self.map.num_bytes
        try:
            size, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if size != pool_bytes or not seals & fcntl.F_SEAL_SHRINK:
                raise OSError(f"the peer's memory has {size} bytes and seals {seals:#x} where {pool_bytes} sealed bytes were announced")
            self._mapping = mmap.mmap(fd, pool_bytes)
        finally:
            os.close(fd)
        self.pool: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(self._mapping, dtype=np.uint8)

    def block(self, block_id: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of one block, writable."""
        return self.pool[self.map.place(block_id)]

    def close(self) -> None:
        """Unmaps it. No thread may hold a view of `pool`."""
        del self.pool
        self._mapping.close()
