"""How one block crosses a data connection: both halves of each transport, side by side. Blocking; each half is used by threads.

    tcp    frame and bytes go through the socket, straight from pool to pool; the receiver's thread is who writes into its pool
    shm    the sender's thread copies into the receiver's pool, then the frame says so; the receiver checks what it finds there

Knows nothing of which blocks may be sent or written.
"""

import mmap
import socket
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import xxhash

from services.mesh import failpoints
from services.mesh.kv_copy import copy_past_caches
from services.mesh.kv_memory import KVMemory, PeerMemory
from services.mesh.kv_wire import Frame, FrameKind, block_checksum, recv_whole, send_whole

# A block is received and hashed in pieces of this size, as what was just copied out of the kernel is still in the nearest caches. Measured
# on loopback with blocks of 1 and 8 MiB: 0.8–1.1 of a bare socket's rate, against 0.6–0.8 when a block is hashed after it is complete.
# Half the size is a little faster still on an idle machine, but each piece takes the GIL from a busy engine twice.
# Tried without gain: hashing the next blocks in a second thread while these are sent, and SO_RCVLOWAT against the many small wake-ups.
_PIECE_BYTES = 128 << 10


class Move(NamedTuple):
    """One block's way: block `block_index` of a transfer, from the own block `source_id` to the peer's block `target_id`."""

    block_index: int
    source_id: int
    target_id: int


class SendingHalf(Protocol):
    """Takes blocks of its own pool to one peer."""

    sock: socket.socket
    transport: ClassVar[str]
    writes_peer_memory: ClassVar[bool]  # so that the connection may end only after the last copy: its end is the peer's fence
    run_bytes: ClassVar[int]  # of blocks to push at once, if there are so many: each call and each wake-up of the peer has its price

    def push(self, transfer_id: bytes, run: Sequence[Move]) -> Sequence[Frame]:
        """Takes blocks out of the own pool; returns the frames that must still be sent. Raises OSError."""

    def warm_up(self) -> Iterable[object]:
        """Makes later pushes faster, a part with each item; a thread of its own may do so beside the first pushes."""

    def close(self) -> None:
        """Closes the socket, and gives up what else it holds of the peer."""


class ReceivingHalf(Protocol):
    """Sees to it that blocks from one peer are in its own pool."""

    sock: socket.socket
    transport: ClassVar[str]
    peer_writes_memory: ClassVar[bool]  # so that only the peer, or its end, can tell that nothing more will be written

    def land(self, frame: Frame, target: memoryview | None) -> bool:
        """Whether the block that `frame` announces is in `target` with the right checksum; a target of None discards it. Raises OSError."""


class TcpSendingHalf:
    transport: ClassVar[str] = "tcp"
    writes_peer_memory: ClassVar[bool] = False
    run_bytes: ClassVar[int] = 1 << 20  # hashed, then sent: no more than stays in a core's cache between the two

    def __init__(self, sock: socket.socket, memory: KVMemory, *, checksum: bool) -> None:
        self.sock = sock
        self._memory = memory
        self._checksum = checksum

    def push(self, transfer_id: bytes, run: Sequence[Move]) -> Sequence[Frame]:
        parts: list[bytes | memoryview] = []
        for block_index, source_id, _ in run:
            block = self._memory.block(source_id)
            frame = _block_frame(transfer_id, block_index, block, checksum=self._checksum)
            parts += (frame.pack(), failpoints.on_wire("kv.tcp_block", block))
        send_whole(self.sock, parts)
        return ()

    def warm_up(self) -> Iterable[object]:
        return ()

    def close(self) -> None:
        self.sock.close()


class TcpReceivingHalf:
    transport: ClassVar[str] = "tcp"
    peer_writes_memory: ClassVar[bool] = False

    def __init__(self, sock: socket.socket, *, checksum: bool) -> None:
        self.sock = sock
        self._checksum = checksum
        self._scratch = memoryview(bytearray(_PIECE_BYTES))

    def land(self, frame: Frame, target: memoryview | None) -> bool:
        digest = xxhash.xxh3_64()
        for start in range(0, frame.length, _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, frame.length)
            piece = self._scratch[: stop - start] if target is None else target[start:stop]
            recv_whole(self.sock, piece)
            if self._checksum and target is not None:
                digest.update(piece)
        return not self._checksum or target is None or digest.intdigest() == frame.checksum


class ShmSendingHalf:
    transport: ClassVar[str] = "shm"
    writes_peer_memory: ClassVar[bool] = True
    run_bytes: ClassVar[int] = 4 << 20  # one frame's wake-up costs as much time as copying a quarter of a megabyte

    def __init__(self, sock: socket.socket, memory: KVMemory, peer_memory: PeerMemory, *, checksum: bool) -> None:
        self.sock = sock
        self._memory = memory
        self._peer_memory = peer_memory
        self._checksum = checksum

    def push(self, transfer_id: bytes, run: Sequence[Move]) -> Sequence[Frame]:
        frames, moves = [], []
        for block_index, source_id, target_id in run:
            source, target = self._memory.map.place(source_id), self._peer_memory.map.place(target_id)
            block = self._memory.buffer[source]
            frames.append(_block_frame(transfer_id, block_index, block, checksum=self._checksum))
            if target.stop - target.start != len(block):
                raise ConnectionAbortedError(f"the peer granted {target.stop - target.start} bytes for a block of {len(block)}")
            data = failpoints.on_wire("kv.shm_block", block)
            if data is block:
                moves.append((target.start, source.start, len(block)))
            else:
                np.copyto(self._peer_memory.block(target_id)[: len(data)], data)
        copy_past_caches(self._peer_memory.pool, np.frombuffer(self._memory.buffer, np.uint8), moves)
        return frames

    def warm_up(self) -> Iterable[object]:
        # The kernel maps sixteen pages for a byte that is read, where a first write to each page costs 2 µs: more than to copy it.
        for start in range(0, len(self._peer_memory.pool), 1 << 30):
            yield self._peer_memory.pool[start : start + (1 << 30) : 16 * mmap.PAGESIZE].sum()

    def close(self) -> None:
        self._peer_memory.close()
        self.sock.close()


class ShmReceivingHalf:
    transport: ClassVar[str] = "shm"
    peer_writes_memory: ClassVar[bool] = True

    def __init__(self, sock: socket.socket, *, checksum: bool) -> None:
        self.sock = sock
        self._checksum = checksum

    def land(self, frame: Frame, target: memoryview | None) -> bool:
        return not self._checksum or target is None or block_checksum(target) == frame.checksum


def _block_frame(transfer_id: bytes, block_index: int, block: memoryview, *, checksum: bool) -> Frame:
    return Frame(FrameKind.BLOCK, transfer_id, block_index, len(block), block_checksum(block) if checksum else 0)
