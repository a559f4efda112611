"""Answers to a worker's stream: merged, and never those of another start of it."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from protos.baton.v1 import kv_index_pb2
from services.core.errors import InvalidRequest, Unavailable
from services.kv_index.session import PublishSession
from services.mesh.block_events import BlockChange


def change(*, worker_id: str = "w", epoch: int = 2) -> BlockChange:
    return BlockChange(worker_id=worker_id, epoch=epoch, sequence_number=1, snapshot=True, gone=False, removed=[], stored=[])


def identified() -> PublishSession:
    session = PublishSession()
    assert session.identify(change())
    return session


async def answers(session: PublishSession) -> list[tuple[int, bool]]:
    """All there are now."""
    found = []
    responses: AsyncIterator[kv_index_pb2.PublishResponse] = session.responses()
    try:
        while True:
            async with asyncio.timeout(0.01):
                response = await anext(responses)
            found.append((response.sequence_number, response.need_snapshot))
    except (TimeoutError, StopAsyncIteration):
        return found


def test_identify_when_another_worker_speaks_on_the_stream_then_raises_invalid_request() -> None:
    session = identified()
    assert not session.identify(change())
    for other in (change(worker_id="v"), change(epoch=3)):
        with pytest.raises(InvalidRequest, match=r"event\.worker"):
            session.identify(other)


def test_responses_when_much_happened_then_one_answer_says_it_all() -> None:
    session = identified()
    session.acknowledge(2, 5)
    session.acknowledge(2, 3)
    session.want_snapshot()
    session.want_snapshot()
    assert asyncio.run(answers(session)) == [(5, True)]


def test_acknowledge_when_it_is_of_another_start_of_the_worker_then_nothing_is_said() -> None:
    async def test() -> None:
        session = identified()
        session.acknowledge(1, 500)
        assert await answers(session) == []
        session.answer()
        assert await answers(session) == [(0, False)]

    asyncio.run(test())


def test_want_snapshot_when_one_is_on_its_way_then_is_said_once_and_again_after_it_came() -> None:
    async def test() -> None:
        session = identified()
        session.want_snapshot()
        assert await answers(session) == [(0, True)]
        session.want_snapshot()
        assert await answers(session) == [(0, False)]
        session.snapshot_came()
        session.want_snapshot()
        assert await answers(session) == [(0, True)]

    asyncio.run(test())


def test_responses_when_the_worker_has_finished_then_end_after_a_last_answer() -> None:
    async def test() -> None:
        session = identified()
        session.acknowledge(2, 7)
        session.finish()
        assert [response.sequence_number async for response in session.responses()] == [7]

    asyncio.run(test())


def test_responses_when_the_session_is_ended_then_raise_its_error() -> None:
    async def test() -> None:
        session = identified()
        session.acknowledge(2, 7)
        session.end(Unavailable("stands by"))
        with pytest.raises(Unavailable, match="stands by"):
            await anext(session.responses())

    asyncio.run(test())
