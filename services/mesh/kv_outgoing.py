"""Transfers out of a pool: what waits to be sent, and the threads of a connection that send it. Knows nothing of how a peer was found.

    event loop                     lanes (threads: one for tcp, a few for shm)          listener (thread)
    open, send ─▶ pending ─▶ ready ─▶ push: the block leaves the pool
                                     frames: the peer is told              peer ─▶ OPENED, REFUSED, STOP, end of the connection
    send returns ◀── when its last block has left the pool and the peer was told

Lanes take a short run of blocks of each ready transfer in turn, so that a short prompt does not wait for a long one. Whatever ends a
transfer (its owner, a STOP, a broken connection) empties its queue, and then counts down the lanes that are inside one of its blocks: at
zero nothing of it is read any more. All state is under one lock per connection.
"""

import asyncio
import socket
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.core.errors import BatonError, PeerUnavailable, TransferFenced
from services.mesh import failpoints
from services.mesh.kv_channel import Move, SendingHalf
from services.mesh.kv_memory import KVMemory
from services.mesh.kv_wire import (
    MAX_PACKET_FRAMES,
    Frame,
    FrameKind,
    ProtocolViolation,
    block_checksum,
    recv_frames,
    send_frames,
    shut_down,
)

# A lane leaves no less than this to another one: copying it takes no longer than waking a thread.
_MIN_RUN_BYTES = 1 << 20
# How long a lane may take, when its connection ends, to tell the peer of the block that it has just copied.
_LAST_WORDS_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineBlock:
    """A block that its sender must put into its own gRPC stream; fields as in the proto KVBlock."""

    index: int
    data: bytes = field(repr=False)
    checksum: int


@dataclass(slots=True, eq=False)
class _Batch:
    """The blocks of one send()."""

    num_left: int
    sent: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Block:
    index: int
    block_id: int
    batch: _Batch


class StreamedTransfer:
    """A transfer whose bytes go over a data connection. Made by KVSender.open."""

    def __init__(self, connection: "Connection", transfer_id: bytes, target_ids: Sequence[int]) -> None:
        self.transport = connection.transport
        self.transfer_id = transfer_id
        self.target_ids = tuple(target_ids)
        self._connection = connection
        # Under the connection's lock.
        self.pending: deque[_Block | None] = deque()  # None: the OPEN frame
        self.batches: set[_Batch] = set()
        self.num_inside = 0  # lanes that are in one of its blocks now
        self.error: BatonError | None = None  # once set, nothing more is taken up
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.out: asyncio.Future[None] = loop.create_future()  # ended, and no lane inside

    async def send(self, blocks: Sequence[tuple[int, int]]) -> list[InlineBlock]:
        """Sends (index in the transfer, own block id) pairs, each index once; returns an empty list when they have left the own pool and
        the peer was told.

        Raises PeerUnavailable when the connection has ended, TransferFenced when either side has ended the transfer. Cancelling ends the
        transfer, but one of its blocks may still be on its way out: stop() waits for that.
        """
        if blocks:
            await self._connection.send(self, blocks)
        return []

    async def finish(self) -> None:
        """Ends a transfer that has been sent: waits for what is still on its way out of the own pool. Raises as send() does."""
        await self._connection.finish(self)

    async def stop(self, timeout_s: float) -> None:
        """Ends a transfer that is not wanted any more; on return no byte of the own pool is read for it, nor will be.

        A tcp peer that does not take the block that is on its way within `timeout_s` loses the connection. After finish(): no effect.
        """
        await self._connection.stop(self, timeout_s)


class Connection:
    """A data connection to one peer, for any number of transfers. Ends by itself when the peer does."""

    def __init__(self, channel: SendingHalf, memory: KVMemory, *, num_lanes: int, blocks_sent: Counter[str]) -> None:
        self.transport = channel.transport
        self._channel = channel
        self._memory = memory
        self._blocks_sent = blocks_sent
        self._loop = asyncio.get_running_loop()
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # what the connection and its transfers are in
        self._work = threading.Condition(lock)  # something is ready: wakes one lane, which wakes the next if that is not all
        self._transfers: dict[bytes, StreamedTransfer] = {}
        self._ready: deque[StreamedTransfer] = deque()  # those with something pending; each once
        self._num_inside = 0  # lanes that are in any block now
        self._error: BatonError | None = None  # once set, the connection is over
        largest = max(region.block_bytes for region in memory.map.regions)
        self._max_run_blocks = max(1, min(channel.run_bytes // largest, MAX_PACKET_FRAMES))
        self._min_run_blocks = min(self._max_run_blocks, -(-_MIN_RUN_BYTES // largest))
        kind = channel.transport
        self._lanes = [
            threading.Thread(target=self._run_lane, args=(i == num_lanes - 1,), name=f"kv-send-{kind}-{i}", daemon=True)
            for i in range(num_lanes)
        ]
        self._listener = threading.Thread(target=self._run_listener, name=f"kv-send-{kind}-listener", daemon=True)
        for thread in (*self._lanes, self._listener):
            thread.start()

    @property
    def is_usable(self) -> bool:
        return self._error is None

    @property
    def is_gone(self) -> bool:
        """Whether it has ended and cleared up."""
        return not self._listener.is_alive()

    # On the event loop.

    async def open(self, transfer_id: bytes, target_ids: Sequence[int]) -> StreamedTransfer:
        """Raises TransferFenced when the peer does not wait for this transfer (any more), PeerUnavailable when the connection ends."""
        transfer = StreamedTransfer(self, transfer_id, target_ids)
        with self._changed:
            if self._error:
                raise self._error
            if transfer_id in self._transfers:
                raise TransferFenced("a transfer of this id is open already")
            self._transfers[transfer_id] = transfer
            self._queue(transfer, [None])
        await self._wait_or_end(transfer, transfer.opened)
        return transfer

    async def send(self, transfer: StreamedTransfer, blocks: Sequence[tuple[int, int]]) -> None:
        for index, block_id in blocks:
            assert 0 <= index < len(transfer.target_ids) and 0 <= block_id < self._memory.num_blocks
        batch = _Batch(len(blocks), self._loop.create_future())
        with self._changed:
            if transfer.error:
                raise transfer.error
            transfer.batches.add(batch)
            self._queue(transfer, [_Block(index, block_id, batch) for index, block_id in blocks])
        await self._wait_or_end(transfer, batch.sent)

    async def finish(self, transfer: StreamedTransfer) -> None:
        while True:
            with self._changed:
                if transfer.error:
                    raise transfer.error
                batches = list(transfer.batches)
                if not batches:
                    self._end(transfer, TransferFenced("the KV transfer is finished"))
                    return
            await asyncio.wait([batch.sent for batch in batches])

    async def stop(self, transfer: StreamedTransfer, timeout_s: float) -> None:
        with self._changed:
            self._end(transfer, TransferFenced("the KV transfer was stopped"))
        is_out, _ = await asyncio.wait([transfer.out], timeout=timeout_s)
        if not is_out:
            self._break(PeerUnavailable("the KV receiver did not take a block in time"))
            await asyncio.wait([transfer.out])

    async def _wait_or_end(self, transfer: StreamedTransfer, future: asyncio.Future[None]) -> None:
        try:
            await future
        except asyncio.CancelledError:
            with self._changed:
                self._end(transfer, TransferFenced("the sending of the KV transfer was cancelled"))
            raise

    async def close(self) -> None:
        """Ends the connection and all its transfers; on return its threads, its socket and its mapping are gone."""
        self._break(PeerUnavailable("the KV sender is closed"))
        await asyncio.to_thread(self._listener.join)

    # With the lock held.

    def _queue(self, transfer: StreamedTransfer, blocks: Sequence[_Block | None]) -> None:
        if not transfer.pending:
            self._ready.append(transfer)
        transfer.pending.extend(blocks)
        self._work.notify()

    def _end(self, transfer: StreamedTransfer, error: BatonError) -> None:
        """Nothing more of the transfer is taken up; whoever waits for it gets `error`. The first end counts."""
        if transfer.error:
            return
        transfer.error = error
        if transfer.pending:
            self._ready.remove(transfer)
            transfer.pending.clear()
        for future in (transfer.opened, *(batch.sent for batch in transfer.batches)):
            self._resolve(future, error)
        transfer.batches.clear()
        self._forget_if_out(transfer)

    def _leave(self, transfer: StreamedTransfer) -> None:
        """A lane is out of the blocks of a run."""
        self._num_inside -= 1
        transfer.num_inside -= 1
        self._forget_if_out(transfer)

    def _count_sent(self, transfer: StreamedTransfer, run: Sequence[_Block]) -> None:
        """The blocks of a run are out, and the peer knows."""
        for block in run:
            if block.batch not in transfer.batches:
                continue
            self._blocks_sent[self.transport] += 1
            block.batch.num_left -= 1
            if not block.batch.num_left:
                transfer.batches.remove(block.batch)
                self._resolve(block.batch.sent, None)

    def _forget_if_out(self, transfer: StreamedTransfer) -> None:
        if transfer.error and not transfer.num_inside:
            del self._transfers[transfer.transfer_id]
            self._resolve(transfer.out, None)
            self._changed.notify_all()

    def _resolve(self, future: asyncio.Future[None], error: BatonError | None) -> None:
        self._loop.call_soon_threadsafe(_resolve, future, error)

    # On any thread.

    def _break(self, error: BatonError) -> None:
        """Ends the connection and everything on it; the listener, woken by the end of its socket, clears up."""
        with self._changed:
            if self._error:
                return
            self._error = error
            for transfer in list(self._transfers.values()):
                self._end(transfer, error)
            self._changed.notify_all()
            self._work.notify_all()
            # Our end is what tells the peer that nobody writes into its memory any more: with a copy under way, only listening ends here.
            shut_down(self._channel.sock, socket.SHUT_RD if self._channel.writes_peer_memory else socket.SHUT_RDWR)

    def _run_lane(self, warms_up: bool) -> None:
        error = PeerUnavailable("a thread that sends KV blocks has failed")
        try:
            if warms_up:
                for _ in self._channel.warm_up():
                    if self._error:
                        break
            while (taken := self._take()) is not None:
                self._push(*taken)
        except OSError as failure:
            error = PeerUnavailable(f"the connection to the KV receiver failed: {failure}")
        finally:
            self._break(error)

    def _take(self) -> tuple[StreamedTransfer, list[_Block]] | None:
        """The next run of blocks; without blocks: OPEN is due. None: the connection is over."""
        with self._changed:
            self._work.wait_for(lambda: self._ready or self._error)
            if self._error:
                return None
            transfer = self._ready.popleft()
            share = max(self._min_run_blocks, -(-len(transfer.pending) // len(self._lanes)))
            num_blocks = min(self._max_run_blocks, share, len(transfer.pending))
            run = [block for block in (transfer.pending.popleft() for _ in range(num_blocks)) if block]
            if transfer.pending:
                self._ready.append(transfer)
            if self._ready:
                self._work.notify()
            self._num_inside += 1
            transfer.num_inside += 1
            return transfer, run

    def _push(self, transfer: StreamedTransfer, run: Sequence[_Block]) -> None:
        frames: Sequence[Frame] = [Frame(FrameKind.OPEN, transfer.transfer_id)]
        try:
            if run:
                failpoints.hit("kv.inside_block")
                moves = [Move(block.index, block.block_id, transfer.target_ids[block.index]) for block in run]
                frames = self._channel.push(transfer.transfer_id, moves)
        finally:
            with self._changed:
                self._leave(transfer)
        # What waits for the blocks to be sent is woken after the peer, which has more to do with them.
        send_frames(self._channel.sock, frames)
        with self._changed:
            self._count_sent(transfer, run)

    def _run_listener(self) -> None:
        error = PeerUnavailable("the KV receiver closed the connection")
        try:
            while frames := recv_frames(self._channel.sock):
                for frame in frames:
                    self._hear(frame)
        except OSError as failure:
            error = PeerUnavailable(f"the connection to the KV receiver failed: {failure}")
        self._break(error)
        for lane in self._lanes:
            lane.join(_LAST_WORDS_TIMEOUT_S)
        if self._channel.writes_peer_memory:
            with self._changed:
                self._changed.wait_for(lambda: not self._num_inside)
        shut_down(self._channel.sock, socket.SHUT_RDWR)  # for a lane whose last words nobody hears
        for lane in self._lanes:
            lane.join()
        self._channel.close()

    def _hear(self, frame: Frame) -> None:
        with self._changed:
            transfer = self._transfers.get(frame.transfer_id)
            if frame.kind is FrameKind.OPENED:
                if transfer:
                    self._resolve(transfer.opened, None)
            elif frame.kind is FrameKind.REFUSED:
                if transfer:
                    self._end(transfer, TransferFenced("the KV receiver does not wait for this transfer (any more)"))
            elif frame.kind is FrameKind.STOP and self._channel.writes_peer_memory:
                if transfer:
                    self._end(transfer, TransferFenced("the KV receiver fenced the transfer"))
                    self._changed.wait_for(lambda: not transfer.num_inside)
            else:
                raise ProtocolViolation(f"{frame.kind.name} is not for a sender")
        if frame.kind is FrameKind.STOP:
            send_frames(self._channel.sock, [Frame(FrameKind.STOPPED, frame.transfer_id)])


def _resolve(future: asyncio.Future[None], error: BatonError | None) -> None:
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)


class InlineTransfer:
    """A transfer of the grpc transport: its blocks go into the caller's own stream. Made by KVSender.open."""

    def __init__(
        self, memory: KVMemory, transfer_id: bytes, target_ids: Sequence[int], *, checksum: bool, blocks_sent: Counter[str]
    ) -> None:
        self.transport = "grpc"
        self.transfer_id = transfer_id
        self.target_ids = tuple(target_ids)
        self._memory = memory
        self._checksum = checksum
        self._blocks_sent = blocks_sent
        self._ended = False

    async def send(self, blocks: Sequence[tuple[int, int]]) -> list[InlineBlock]:
        """Copies of the blocks that (index in the transfer, own block id) pairs name. Raises TransferFenced after the end."""
        inline = []
        for index, block_id in blocks:
            if self._ended:
                raise TransferFenced("the KV transfer has ended")
            assert 0 <= index < len(self.target_ids)
            # On the event loop, like the serialization that follows: this transport is for networks that allow nothing better.
            block = self._memory.block(block_id)
            data = bytes(failpoints.on_wire("kv.grpc_block", block))
            inline.append(InlineBlock(index=index, data=data, checksum=block_checksum(block) if self._checksum else 0))
            self._blocks_sent["grpc"] += 1
            await asyncio.sleep(0)
        return inline

    async def finish(self) -> None:
        self._ended = True

    async def stop(self, timeout_s: float) -> None:
        self._ended = True
