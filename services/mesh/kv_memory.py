"""The memory that a worker's KV blocks live in, and the same memory seen from another process of the host.

    KVMemory ── fd over a Unix socket (SCM_RIGHTS) ──▶ PeerMemory

The pool is a memfd: memory with a descriptor and without a name, so a process that is killed leaves nothing behind. Where the platform
has none, the pool is anonymous memory and cannot be shared. Knows nothing of transfers, nor of what the blocks hold.
"""

import contextlib
import fcntl
import mmap
import os
import sys
from pathlib import Path
from typing import Any, Self

import numpy as np

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def read_host_id() -> str:
    """A name that processes under one kernel have in common; empty where there is none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


class KVMemory:
    """A pool of `num_blocks` blocks, each `block_bytes` contiguous bytes, zeroed at first.

    All of it is there from the start, which takes half a second per GiB. Memory that came page by page would be too little when the worker
    is busiest, and blocks would land in new pages at a seventh of the rate (measured: 1 GB/s, and 7 to 9 in pages that exist).

    fd        of the memfd; None: this pool cannot be mapped by others
    buffer    all bytes; an engine makes its tensor over it (torch.frombuffer)
    blocks    [num_blocks, block_bytes] uint8, the same bytes
    """

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        assert num_blocks > 0 and block_bytes > 0
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.pool_bytes = num_blocks * block_bytes
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
        self.blocks = _as_blocks(self._mapping, num_blocks, block_bytes)
        self.blocks.reshape(-1)[:: mmap.PAGESIZE] = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def block(self, block_id: int) -> memoryview:
        """The bytes of one block, writable."""
        assert 0 <= block_id < self.num_blocks
        return self.buffer[block_id * self.block_bytes : (block_id + 1) * self.block_bytes]

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
    """Another process's pool, writable: `blocks` is [num_blocks, block_bytes] uint8."""

    def __init__(self, fd: int, *, pool_bytes: int, block_bytes: int) -> None:
        """Takes `fd` over and closes it. Raises OSError when it is not a pool of that size, or one that its owner could still cut short."""
        try:
            size, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if size != pool_bytes or not seals & fcntl.F_SEAL_SHRINK:
                raise OSError(f"the peer's memory has {size} bytes and seals {seals:#x} where {pool_bytes} sealed bytes were announced")
            self._mapping = mmap.mmap(fd, pool_bytes)
        finally:
            os.close(fd)
        self.blocks = _as_blocks(self._mapping, pool_bytes // block_bytes, block_bytes)

    def close(self) -> None:
        """Unmaps it. No thread may hold a view of `blocks`."""
        del self.blocks
        self._mapping.close()


def _as_blocks(mapping: mmap.mmap, num_blocks: int, block_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(mapping, dtype=np.uint8).reshape(num_blocks, block_bytes)
