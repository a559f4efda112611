"""Transfers into a pool: what was granted, what has landed, and when nothing can write any more. Knows nothing of sockets.

    GRANTED ──open──▶ OPEN ──last block lands──────────────────▶ CLOSED
       │               └──fence, failure──▶ CLOSING ──writer out──▶ CLOSED
       └──fence──────────────────────────────────────────────────▶ CLOSED

    GRANTED   nobody writes yet
    OPEN      one writer puts blocks where the grant says, each once
    CLOSING   no block is accepted any more, but the writer may still be inside one
    CLOSED    no byte of this transfer will ever be written: its blocks may be used

Reader threads and the event loop meet here, under one lock for all transfers of a pool; the loop's waiters are only woken, and look again.
"""

import asyncio
import enum
import os
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from services.core.errors import BatonError, ChecksumMismatch, PeerUnavailable, TransferFenced
from services.mesh.kv_memory import KVMemory
from services.mesh.kv_wire import TRANSFER_ID_BYTES, ProtocolViolation, block_checksum


class Writer(Protocol):
    """Whoever fills a transfer's blocks: a data connection."""

    transport: str
    peer_writes_memory: bool  # True: out only when the peer says so or is gone; False: a thread of ours writes, out between two blocks

    def ask_to_stop(self, transfer_id: bytes) -> None:
        """Tells the peer that its transfer is over. Never waits."""

    def cut_off(self) -> bool:
        """Ends the connection if that makes the writer leave at once; False: it would not."""


class Phase(enum.Enum):
    GRANTED = enum.auto()
    OPEN = enum.auto()
    CLOSING = enum.auto()
    CLOSED = enum.auto()


class IncomingTransfer:
    """A grant and what became of it. Made by KVReceiver.grant; its owner waits, and fences it on every way out but a complete landing.

    transfer_id   16 random bytes
    block_ids     of the own pool; block i of the transfer lands in block_ids[i]
    """

    def __init__(self, grants: "Grants", block_ids: Sequence[int]) -> None:
        self.transfer_id = os.urandom(TRANSFER_ID_BYTES)
        self.block_ids = tuple(block_ids)
        self._grants = grants
        self._phase = Phase.GRANTED
        self._error: BatonError | None = None
        self._writer: Writer | None = None
        self._writing = False  # a thread of ours is inside a block
        self._has_landed = bytearray(len(block_ids))
        self._num_landed = self._num_leading = self._bytes_landed = 0
        self._ended, self._closed = asyncio.Event(), asyncio.Event()

    # What the owner uses, on the event loop.

    @property
    def num_landed(self) -> int:
        return self._num_landed

    @property
    def num_landed_leading(self) -> int:
        """Blocks that have landed before the first one that has not."""
        return self._num_leading

    @property
    def bytes_landed(self) -> int:
        return self._bytes_landed

    @property
    def is_fenced(self) -> bool:
        """Whether no byte of this transfer can be written any more; true of a complete one, too."""
        with self._grants.lock:  # whoever was woken by the end must not look before the thread that ends it has closed it, too
            return self._phase is Phase.CLOSED

    async def wait_landed(self) -> None:
        """Returns when every block has landed and was checked.

        Raises ChecksumMismatch, TransferFenced, and PeerUnavailable when the connection that carries this transfer ended before.
        """
        await self._ended.wait()
        self.raise_error()

    def raise_error(self) -> None:
        """Raises what wait_landed() would if it is known already."""
        if self._error:
            raise self._error

    async def fence(self, timeout_s: float) -> bool:
        """Ends the transfer; True: from now on no byte of it is ever written.

        False after `timeout_s`: the sender writes into shared memory and has neither answered nor died. The blocks must then stay in
        quarantine until wait_fenced returns. Cancelling leaves the transfer ended, and not fenced.
        """
        self.end(TransferFenced("the KV transfer was fenced before all blocks had landed"))
        if self.is_fenced:
            return True
        writer = self._writer
        assert writer, "without a writer, ending is closing"
        writer.ask_to_stop(self.transfer_id)
        try:
            async with asyncio.timeout(timeout_s):
                await self._closed.wait()
        except TimeoutError:
            if writer.cut_off():
                await self._closed.wait()
        return self.is_fenced

    async def wait_fenced(self) -> None:
        """Returns when no byte of this transfer can be written any more."""
        await self._closed.wait()

    def land_inline(self, index: int, data: bytes, checksum: int) -> None:
        """Puts a block in place that came inside a gRPC message. Copies on the caller's thread, which is the event loop's.

        Raises ChecksumMismatch, PeerUnavailable for what the sender had no right to send, or the error that ended the transfer before.
        """
        with self._grants.lock:
            if self._phase is Phase.GRANTED:
                self._phase = Phase.OPEN
        try:
            if self._writer:
                raise ProtocolViolation(f"{len(data)} bytes inside a message, where another transport was agreed")
            target = self.begin_block(index, None, len(data))
        except ProtocolViolation as violation:
            self.end(PeerUnavailable(f"the KV sender broke the protocol: {violation}"))
            target = None
        if target is not None:
            intact = not self._grants.checksum or block_checksum(data) == checksum
            if intact:
                target[:] = data
            self.end_block(index, intact=intact)
        if self._error:
            raise self._error

    def end(self, error: BatonError) -> None:
        """Accepts no block any more; waiters get `error`."""
        with self._grants.lock:
            self._end(error)

    # What data connections use, on their threads.

    def open_by(self, writer: Writer) -> bool:
        """Whether `writer` may write from now on; one writer, once."""
        with self._grants.lock:
            if self._phase is not Phase.GRANTED:
                return False
            self._phase, self._writer = Phase.OPEN, writer
            return True

    def begin_block(self, index: int, writer: Writer | None, num_bytes: int) -> memoryview | None:
        """Where block `index` of so many bytes belongs; None: nobody waits for it (any more). end_block() follows.

        Raises ProtocolViolation.
        """
        with self._grants.lock:
            if self._phase is not Phase.OPEN or self._writer is not writer:
                return None
            if index >= len(self.block_ids):
                raise ProtocolViolation(f"block {index} of a grant of {len(self.block_ids)}")
            if self._has_landed[index]:
                raise ProtocolViolation(f"block {index} came twice")
            if num_bytes != (due := self._grants.memory.map.size(self.block_ids[index])):
                raise ProtocolViolation(f"block {index} has {num_bytes} bytes, not {due}")
            self._writing = True
        return self._grants.memory.block(self.block_ids[index])

    def end_block(self, index: int, *, intact: bool) -> None:
        """Block `index` is where it belongs, with the right bytes or not."""
        with self._grants.lock:
            self._writing = False
            if not intact:
                self._end(ChecksumMismatch(f"KV block {index} of {len(self.block_ids)} arrived with other bytes than were sent"))
            elif self._phase is Phase.OPEN:
                self._count_landed(index)
            self._close_if_writer_is_out()

    def end_writing(self, writer: Writer | None, error: BatonError, *, writer_is_out: bool) -> None:
        """`writer` accepts nothing more for this transfer; with `writer_is_out` it cannot write any more either."""
        with self._grants.lock:
            if self._writer is not writer:
                return
            self._end(error)
            if writer_is_out:
                self._writing = False
                self._close()

    # With the lock held.

    def _count_landed(self, index: int) -> None:
        self._has_landed[index] = True
        self._num_landed += 1
        self._bytes_landed += self._grants.memory.map.size(self.block_ids[index])
        while self._num_leading < len(self.block_ids) and self._has_landed[self._num_leading]:
            self._num_leading += 1
        self._grants.blocks_landed[self._writer.transport if self._writer else "grpc"] += 1
        if self._num_landed == len(self.block_ids):
            self._close()

    def _end(self, error: BatonError) -> None:
        """Accepts no block any more; the first error is the one that is told."""
        if self._phase not in (Phase.GRANTED, Phase.OPEN):
            return
        self._error = error
        self._phase = Phase.CLOSING
        self._grants.wake(self._ended)
        self._close_if_writer_is_out()

    def _close_if_writer_is_out(self) -> None:
        if self._phase is Phase.CLOSING and not self._writing and not (self._writer and self._writer.peer_writes_memory):
            self._close()

    def _close(self) -> None:
        if self._phase is not Phase.CLOSED:
            self._phase = Phase.CLOSED
            self._grants.forget(self)
            self._grants.wake(self._ended)
            self._grants.wake(self._closed)


class Grants:
    """The transfers that may still write into a pool, by id.

    blocks_landed   by transport, since the start
    """

    def __init__(self, memory: KVMemory, *, checksum: bool) -> None:
        """Made on the event loop that will wait for the transfers."""
        self.memory = memory
        self.checksum = checksum
        self.lock = threading.Lock()
        self.blocks_landed: Counter[str] = Counter()
        self._transfers: dict[bytes, IncomingTransfer] = {}
        self._granted_blocks: set[int] = set()
        self._loop = asyncio.get_running_loop()

    def add(self, block_ids: Sequence[int]) -> IncomingTransfer:
        """A new grant of blocks that its caller owns, and that no other open grant has."""
        blocks = set(block_ids)
        assert blocks and len(blocks) == len(block_ids) and min(blocks) >= 0 and max(blocks) < self.memory.num_blocks
        transfer = IncomingTransfer(self, block_ids)
        with self.lock:
            assert self._granted_blocks.isdisjoint(blocks), "a block was granted to two transfers"
            self._granted_blocks |= blocks
            self._transfers[transfer.transfer_id] = transfer
        return transfer

    def find(self, transfer_id: bytes) -> IncomingTransfer | None:
        with self.lock:
            return self._transfers.get(transfer_id)

    def all(self) -> list[IncomingTransfer]:
        with self.lock:
            return list(self._transfers.values())

    def forget(self, transfer: IncomingTransfer) -> None:
        """Nothing can write for it any more. With the lock held."""
        del self._transfers[transfer.transfer_id]
        self._granted_blocks.difference_update(transfer.block_ids)

    def wake(self, event: asyncio.Event) -> None:
        """Sets an event of the loop, from any thread."""
        self._loop.call_soon_threadsafe(event.set)
