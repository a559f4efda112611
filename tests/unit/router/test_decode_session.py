"""The router's end of a session, against a worker that says what the test wants, over a real channel."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from protos.baton.v1 import common_pb2, decode_pb2
from services.core.errors import BatonError, EngineStopped, PeerUnavailable, SlowReader
from services.core.types import FinishReason
from services.mesh import convert, status, streams
from services.mesh.streams import HEARTBEAT_S
from services.router.decode_session import LAST_HANDLE, MAX_UNREAD_ARRIVALS, Arrival, DecodeSession, RequestStream
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


NAN = float("nan")
MOST = 2**32 - 1


def logprobs_of(num_top: int, num_values: int) -> decode_pb2.StepFrame:
    frame = tokens(0, 1, 5)
    top = common_pb2.TokenLogprobs(chosen=NAN, top_token_ids=[MOST] * num_top, top_logprobs=[NAN] * num_values)
    frame.logprobs.add(entry=0, logprobs=top)
    return frame


# What a worker may say that ends its session: nothing in it can be believed any more.
SENSELESS = {
    "columns of different lengths": decode_pb2.StepFrame(handles=bytes(8), positions=bytes(4), token_ids=bytes(8)),
    "a column cut off": decode_pb2.StepFrame(handles=bytes(7), positions=bytes(7), token_ids=bytes(7)),
    "a second hello": decode_pb2.StepFrame(hello=decode_pb2.SessionWelcome(worker=common_pb2.WorkerId(worker_id="d1"))),
    "more values than tokens in logprobs": logprobs_of(1, 2),
    "logprobs without end": logprobs_of(100_000, 100_000),
}
# … and what costs nobody anything.
POINTLESS = {
    "nothing": decode_pb2.StepFrame(),
    "tokens without handles": decode_pb2.StepFrame(positions=bytes(4), token_ids=bytes(3)),
    "handles that nobody has": tokens(MOST, 0, 1, 2, 3),
    "an end that nobody waits for": decode_pb2.StepFrame(
        endings=[decode_pb2.Ending(handle=MOST, finish_reason=common_pb2.FINISH_REASON_STOP)] * 3
    ),
    "an error that nobody waits for": decode_pb2.StepFrame(endings=[decode_pb2.Ending(handle=7, error=common_pb2.Error(code=MOST))]),
    "logprobs of entries that are not there": decode_pb2.StepFrame(logprobs=[decode_pb2.EntryLogprobs(entry=MOST)]),
    "facts that cannot be": decode_pb2.StepFrame(
        prefilled=[decode_pb2.Prefilled(handle=handle, prefill_s=NAN, transfer_s=-1e308, kv_bytes=2**64 - 1) for handle in (1, MOST)]
    ),
    "a load that cannot be": decode_pb2.StepFrame(
        load=common_pb2.WorkerLoad(num_running=MOST, uncomputed_prompt_tokens=2**64 - 1, blocks_free=MOST, step_s=NAN, max_num_seqs=0)
    ),
}


@pytest.mark.parametrize("name", [*SENSELESS, *POINTLESS])
def test_frame_when_it_makes_no_sense_ends_its_session_or_nothing(name: str) -> None:
    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            handle, stream = request(session, "a")
            request(session, "b")
            worker.frames.put_nowait(SENSELESS.get(name) or POINTLESS[name])
            if name in SENSELESS:
                error = await error_of(stream)
                assert isinstance(error, PeerUnavailable) and "d0" in error.message
                await wait_until(lambda: len(worker.commands) == 2 and session.is_up)
                handle, stream = request(session, "a")
            worker.frames.put_nowait(tokens(handle, 1, 5))
            assert [arrival.token_ids for arrival in await stream.next_arrivals()] == [(5,)]

    run(main)


def test_session_when_a_worker_speaks_before_its_hello_is_not_begun() -> None:
    class Rude(Worker):
        def first_frames(self) -> list[decode_pb2.StepFrame]:
            return [tokens(0, 1, 5), *super().first_frames()]

    async def main() -> None:
        worker = Rude()
        async with worker.serving() as address:
            welcomed: list[decode_pb2.SessionWelcome] = []
            session = DecodeSession(address, router_id="r", on_welcome=welcomed.append, on_load=lambda _: None, on_lost=lambda: None)
            running = asyncio.ensure_future(session.run())
            await wait_until(lambda: len(worker.commands) == 2)
            assert not welcomed and not session.is_up and not running.done()
            running.cancel()
            await asyncio.wait([running])

    run(main)


@pytest.mark.parametrize("in_run", [False, True])
def test_choice_when_its_end_has_no_reason_ends_all_the_same(in_run: bool) -> None:
    """With tokens beside it such an end was lost, and its request waited for ever."""

    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            handle, stream = request(session, "a")
            frame = tokens(handle, 1, 5) if in_run else decode_pb2.StepFrame()
            frame.endings.add(handle=handle)
            worker.frames.put_nowait(frame)
            assert [arrival.finish_reason for arrival in await stream.next_arrivals()] == [FinishReason.ABORT]

    run(main)


def test_session_when_its_handles_are_used_up_is_made_again_once_its_requests_have_ended() -> None:
    async def main() -> None:
        worker = Worker()
        async with session_with(worker) as session:
            session._next_handle = LAST_HANDLE
            handle, stream = request(session, "last", n=128)
            assert handle + 127 <= MOST
            with pytest.raises(PeerUnavailable, match="d0 has used up its handles"):
                request(session, "one more")
            await asyncio.sleep(2 * HEARTBEAT_S)
            assert len(worker.commands) == 1, "a session with requests goes on"
            session.cancel(stream)
            await wait_until(lambda: len(worker.commands) == 2 and session.is_up)
            handle, stream = request(session, "next")
            worker.frames.put_nowait(tokens(handle, 1, 5))
            assert (handle, len(await stream.next_arrivals())) == (0, 1)

    run(main)
