"""The router's end of a session, against a worker that says what the test wants, over a real channel."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from protos.baton.v1 import decode_pb2
from services.core.errors import BatonError, EngineStopped, PeerUnavailable, SlowReader
from services.core.types import FinishReason
from services.mesh import convert, status, streams
from services.router.decode_session import MAX_UNREAD_ARRIVALS, Arrival, DecodeSession, RequestStream
from tests.unit.router.scripted_worker import Worker, tokens
from tests.waiting import wait_until


@contextlib.asynccontextmanager
async def session_with(worker: Worker) -> AsyncIterator[DecodeSession]:
    async with worker.serving() as address:
        session = DecodeSession(address, router_id="r", on_welcome=lambda _: None, on_load=lambda _: None, on_lost=lambda: None)
        running = asyncio.ensure_future(session.run())
        try:
            await wait_until(lambda: session.is_up)
            yield session
            assert not running.done(), "whatever a worker does, the session goes on"
        finally:
            running.cancel()
            await asyncio.wait([running])


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(bounded())


def request(session: DecodeSession, name: str, *, n: int = 1) -> tuple[int, RequestStream]:
    stream = RequestStream([1] * n, on_slow_reader=lambda: session.cancel(stream))
    start = decode_pb2.Start(request_id=name)
    session.start(start, stream, range(n))
    return start.handle, stream


async def error_of(stream: RequestStream) -> BatonError:
    try:
        while True:
            await stream.next_arrivals()
    except BatonError as error:
        return error


def test_tokens_when_they_come_one_by_one_and_in_runs_are_read_in_order() -> None:
    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            handle, stream = request(session, "a")
            frames = [tokens(handle, 1, 5), tokens(handle, 2, 6, 7), tokens(handle, 4, 8)]
            frames[-1].endings.add(handle=handle, finish_reason=convert.finish_reason_to_proto(FinishReason.LENGTH))
            for frame in frames:
                worker.frames.put_nowait(frame)
            arrivals: list[Arrival] = []
            while not arrivals or arrivals[-1].finish_reason is None:
                arrivals += await stream.next_arrivals()
            assert [token_id for arrival in arrivals for token_id in arrival.token_ids] == [5, 6, 7, 8]
            await session.wait_idle()

    run(main)


@pytest.mark.parametrize("frame", [tokens(0, 2, 5), tokens(0, 2, 5, 6), tokens(0, 0, 5)])
def test_tokens_when_a_position_is_missing_or_comes_twice_end_the_attempt(frame: decode_pb2.StepFrame) -> None:
    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            _, stream = request(session, "a")
            worker.frames.put_nowait(frame)
            assert isinstance(await error_of(stream), PeerUnavailable)

    run(main)


def test_tokens_when_a_run_has_a_gap_end_the_attempt() -> None:
    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            handle, stream = request(session, "a")
            frame = tokens(handle, 1, 5, 6)
            frame.positions = convert.pack_u32([1, 3])
            worker.frames.put_nowait(frame)
            assert "gap" in (await error_of(stream)).message

    run(main)


@pytest.mark.parametrize(
    "frame",
    [
        decode_pb2.StepFrame(handles=b"123", positions=b"123", token_ids=b"123"),
        decode_pb2.StepFrame(handles=convert.pack_u32([0]), positions=convert.pack_u32([1, 2]), token_ids=convert.pack_u32([5])),
    ],
)
def test_session_when_a_frame_cannot_be_read_ends_and_is_made_again(frame: decode_pb2.StepFrame) -> None:
    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            _, stream = request(session, "a")
            worker.frames.put_nowait(frame)
            assert isinstance(await error_of(stream), PeerUnavailable)
            await wait_until(lambda: len(worker.commands) == 2 and session.is_up)

    run(main)


def test_session_when_it_ends_while_commands_are_written_is_made_again() -> None:
    """The bug that this keeps away ended the router: `write` after the end of a call raises InvalidStateError."""

    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            for count in range(2, 12):
                worker.frames.put_nowait(None)
                while len(worker.commands) < count:
                    with contextlib.suppress(PeerUnavailable):
                        request(session, "a")
                    await asyncio.sleep(0)
                await wait_until(lambda: session.is_up)

    run(main)


def test_cancel_when_the_session_was_lost_leaves_the_next_session_s_requests_alone() -> None:
    """Both have handle 0, each in its own session."""

    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            old_handle, old = request(session, "old")
            worker.frames.put_nowait(None)
            await wait_until(lambda: len(worker.commands) == 2 and session.is_up)
            handle, stream = request(session, "new")
            assert handle == old_handle
            session.cancel(old)
            worker.frames.put_nowait(tokens(handle, 1, 5))
            assert [arrival.token_ids for arrival in await stream.next_arrivals()] == [(5,)]
            session.cancel(stream)
            await wait_until(lambda: len(worker.commands[1]) == 2)
            assert [command.WhichOneof("kind") for command in worker.commands[1]] == ["start", "cancel"]

    run(main)


def test_error_when_another_choice_is_open_ends_the_whole_request() -> None:
    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            handle, stream = request(session, "a", n=2)
            ended = decode_pb2.StepFrame()
            ended.endings.add(handle=handle, finish_reason=convert.finish_reason_to_proto(FinishReason.STOP))
            failed = decode_pb2.StepFrame()
            failed.endings.add(handle=handle + 1, error=status.to_proto(EngineStopped("the engine failed"), "a"))
            worker.frames.put_nowait(ended)
            worker.frames.put_nowait(failed)
            assert isinstance(await error_of(stream), EngineStopped)
            await session.wait_idle()

    run(main)


def test_stream_when_its_client_does_not_read_keeps_a_bounded_number_and_cancels() -> None:
    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            handle, stream = request(session, "a")
            other_handle, other = request(session, "b")
            for position in range(1, MAX_UNREAD_ARRIVALS + 10):
                worker.frames.put_nowait(tokens(handle, position, 5))
            worker.frames.put_nowait(tokens(other_handle, 1, 6))
            assert [arrival.token_ids for arrival in await other.next_arrivals()] == [(6,)]
            with pytest.raises(SlowReader):  # what had come is dropped: it would wait for as long as the client does
                await stream.next_arrivals()
            await wait_until(lambda: len(worker.commands[0]) == 3)
            assert worker.commands[0][-1].cancel.handle == handle

    run(main)


def test_error_of_one_start_leaves_the_stream_s_others_to_be_cancelled() -> None:
    """Choices that go on elsewhere are started one by one, and come down one stream."""

    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            stream = RequestStream([5, 9], on_slow_reader=lambda: None)
            starts = [decode_pb2.Start(request_id="a"), decode_pb2.Start(request_id="a")]
            for choice, start in enumerate(starts):
                session.start(start, stream, [choice])
            worker.frames.put_nowait(tokens(starts[1].handle, 9, 7))
            assert [arrival[:2] for arrival in await stream.next_arrivals()] == [(1, (7,))]
            failed = decode_pb2.StepFrame()
            failed.endings.add(handle=starts[0].handle, error=status.to_proto(EngineStopped("the engine failed"), "a"))
            worker.frames.put_nowait(failed)
            assert isinstance(await error_of(stream), EngineStopped)
            session.cancel(stream)
            await wait_until(lambda: len(worker.commands[0]) == 3)
            assert worker.commands[0][-1].cancel.handle == starts[1].handle
            await session.wait_idle()

    run(main)


def test_session_when_nothing_is_asked_for_sends_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_S", 0.02)

    async def main() -> None:
        worker = Worker()
        async with session_with(worker):
            await wait_until(lambda: worker.heartbeats >= 3)

    run(main)
