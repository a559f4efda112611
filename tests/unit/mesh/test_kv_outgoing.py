"""A sender's connection while one of its threads is inside a copy into the peer's memory, held there for as long as the test likes."""

import asyncio
import select
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from services.core.errors import PeerUnavailable, TransferFenced
from services.mesh.kv_channel import Move
from services.mesh.kv_memory import KVMemory
from services.mesh.kv_outgoing import Connection, StreamedTransfer
from services.mesh.kv_wire import Frame, FrameKind, recv_frames, send_frames
from tests.unit.mesh.kv_peers import DEADLINE_S, run, wait_until

TRANSFER_ID = b"t" * 16


class HeldCopies:
    """The shm half of a connection whose every copy takes until `go_on` is set."""

    transport: ClassVar[str] = "shm"
    writes_peer_memory: ClassVar[bool] = True
    run_bytes: ClassVar[int] = 1 << 20

    def __init__(self) -> None:
        self.sock, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer.settimeout(DEADLINE_S)
        self.num_inside = 0
        self.go_on = threading.Event()
        self.error: Exception | None = None

    def push(self, transfer_id: bytes, run: Sequence[Move]) -> Sequence[Frame]:
        self.num_inside += 1
        assert self.go_on.wait(DEADLINE_S)
        if self.error:
            raise self.error
        return [Frame(FrameKind.BLOCK, transfer_id, move.block_index) for move in run]

    def warm_up(self) -> Sequence[object]:
        return ()

    def close(self) -> None:
        self.sock.close()

    async def hear(self) -> list[Frame]:
        """What the peer gets next; nothing: the end of the connection."""
        return await asyncio.to_thread(recv_frames, self.peer)

    def peer_has_heard_nothing(self) -> bool:
        return not select.select([self.peer], [], [], 0)[0]


@asynccontextmanager
async def inside_a_copy() -> AsyncIterator[tuple[HeldCopies, Connection, StreamedTransfer, asyncio.Task[object]]]:
    """A connection with one lane, which is inside the copy of the first of two blocks; the task sends them."""
    half = HeldCopies()
    with KVMemory([(2, 1 << 20)]) as memory, half.peer:
        connection = Connection(half, memory, num_lanes=1, blocks_sent=Counter())
        try:
            opening = asyncio.create_task(connection.open(TRANSFER_ID, [0, 1]))
            assert await half.hear() == [Frame(FrameKind.OPEN, TRANSFER_ID)]
            send_frames(half.peer, [Frame(FrameKind.OPENED, TRANSFER_ID)])
            transfer = await opening
            sending = asyncio.create_task(transfer.send([(0, 0), (1, 1)]))
            await wait_until(lambda: half.num_inside == 1)
            yield half, connection, transfer, sending
        finally:
            half.go_on.set()
            await connection.close()
            await asyncio.wait([sending])
    assert half.num_inside == 1, "the second block was begun after the end"


def test_stop_of_the_peer_when_a_copy_is_under_way_is_answered_after_it() -> None:
    async def main() -> None:
        async with inside_a_copy() as (half, connection, _, sending):
            send_frames(half.peer, [Frame(FrameKind.STOP, TRANSFER_ID)])
            with pytest.raises(TransferFenced):
                await sending
            assert half.peer_has_heard_nothing()
            half.go_on.set()
            frames = await half.hear() + await half.hear()
            assert {frame.kind for frame in frames} == {FrameKind.BLOCK, FrameKind.STOPPED}
            assert connection.is_usable

    run(main)


def test_stop_of_the_peer_when_the_owner_has_stopped_already_is_answered_after_the_copy() -> None:
    async def main() -> None:
        async with inside_a_copy() as (half, _, transfer, sending), asyncio.TaskGroup() as tasks:
            stopping = tasks.create_task(transfer.stop(DEADLINE_S))
            with pytest.raises(TransferFenced):
                await sending
            send_frames(half.peer, [Frame(FrameKind.STOP, TRANSFER_ID)])
            await asyncio.sleep(0.02)  # time to answer too early
            assert half.peer_has_heard_nothing()
            assert not stopping.done()
            half.go_on.set()

    run(main)


def test_stop_of_the_peer_when_the_transfer_is_unknown_is_answered() -> None:
    async def main() -> None:
        async with inside_a_copy() as (half, _, _, _):
            send_frames(half.peer, [Frame(FrameKind.STOP, b"u" * 16)])
            assert await half.hear() == [Frame(FrameKind.STOPPED, b"u" * 16)]

    run(main)


@pytest.mark.parametrize("ended_by", ["owner", "peer"])
def test_connection_when_ended_inside_a_copy_is_closed_after_it(ended_by: str) -> None:
    async def main() -> None:
        async with inside_a_copy() as (half, connection, transfer, sending):
            if ended_by == "peer":
                half.peer.shutdown(socket.SHUT_WR)
            async with asyncio.TaskGroup() as tasks:
                if ended_by == "owner":
                    tasks.create_task(connection.close())
                with pytest.raises(PeerUnavailable):
                    await sending
                await asyncio.sleep(1.2)  # longer than a lane is given for its last words
                assert half.peer_has_heard_nothing()
                half.go_on.set()
                assert [frame.kind for frame in await half.hear()] in ([FrameKind.BLOCK], [])
            with pytest.raises(PeerUnavailable):
                await transfer.send([(1, 1)])
            await wait_until(lambda: connection.is_gone)

    run(main)


def test_connection_when_its_peer_reads_nothing_can_be_closed() -> None:
    async def main() -> None:
        half, sent = HeldCopies(), Counter[str]()
        half.go_on.set()
        with KVMemory([(1, 4096)]) as memory, half.peer:
            connection = Connection(half, memory, num_lanes=1, blocks_sent=sent)
            opening = asyncio.create_task(connection.open(TRANSFER_ID, range(100_000)))
            await half.hear()
            send_frames(half.peer, [Frame(FrameKind.OPENED, TRANSFER_ID)])
            transfer = await opening
            sending = asyncio.create_task(transfer.send([(index, 0) for index in range(100_000)]))
            count = -1
            while count < sent["shm"]:  # until the lane cannot get rid of its frames
                count = sent["shm"]
                await asyncio.sleep(0.1)
            assert count < 100_000
            await connection.close()
            with pytest.raises(PeerUnavailable):
                await sending

    run(main)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_connection_when_a_thread_fails_for_no_known_reason_ends_with_all_its_transfers() -> None:
    async def main() -> None:
        async with inside_a_copy() as (half, connection, transfer, sending):
            half.error = ZeroDivisionError("a bug")
            half.go_on.set()
            with pytest.raises(PeerUnavailable):
                await sending
            with pytest.raises(PeerUnavailable):
                await transfer.finish()
            assert not connection.is_usable
            assert await half.hear() == []

    run(main)
