"""Listening, and with_heartbeats: every item in order, None when nothing came for a while, nothing left behind."""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import uvloop
from hypothesis import given, settings

from services.mesh import streams
from services.mesh.streams import HEARTBEAT_S, SILENCE_S, Listening, with_heartbeats

NEVER_S = 3600.0


def run(test: Callable[[], Any]) -> None:
    """Runs `test` on a loop where nothing is left at its end, and no task's error goes unseen."""
    unseen: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        await test()
        gc.collect()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    uvloop.run(main())
    assert not unseen


class Feed:
    """Items of a queue, as a generator that notes its end; an exception among them is raised."""

    def __init__(self) -> None:
        self.queue = asyncio.Queue[Any]()
        self.ended = False

    async def items(self) -> AsyncGenerator[Any, None]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            await asyncio.sleep(0)
            self.ended = True


def test_heartbeats_when_a_peer_speaks_as_often_as_it_should_leave_room_for_several_to_be_late() -> None:
    assert SILENCE_S >= 3 * HEARTBEAT_S


def test_with_heartbeats_when_items_are_there_yields_them_in_order_and_ends() -> None:
    async def test() -> None:
        feed = Feed()
        for item in (*range(100), None):
            feed.queue.put_nowait(item)
        assert [item async for item in with_heartbeats(feed.items(), NEVER_S)] == list(range(100))
        assert feed.ended

    run(test)


def test_with_heartbeats_when_nothing_comes_yields_none_each_interval_and_then_the_item() -> None:
    async def test() -> None:
        feed = Feed()
        beats = with_heartbeats(feed.items(), 0.01)
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert [await anext(beats) for _ in range(5)] == [None] * 5
        assert loop.time() - began >= 0.045
        feed.queue.put_nowait("late")
        feed.queue.put_nowait(None)
        assert [item async for item in beats if item is not None] == ["late"]

    run(test)


def test_with_heartbeats_when_an_item_comes_in_time_starts_the_interval_anew() -> None:
    async def test() -> None:
        async def ticks() -> AsyncIterator[int]:
            for tick in range(10):
                await asyncio.sleep(0.05)
                yield tick

        # All in all they take longer than the interval, which no single one does.
        assert [item async for item in with_heartbeats(ticks(), 0.4)] == list(range(10))

    run(test)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=12))
def test_with_heartbeats_when_items_and_silences_race_loses_none(pauses: list[int]) -> None:
    async def test() -> None:
        async def ticks() -> AsyncIterator[int]:
            for tick, pause in enumerate(pauses):
                # Around the interval, so that item and heartbeat are due together.
                await asyncio.sleep(pause * 0.001)
                yield tick

        assert [item async for item in with_heartbeats(ticks(), 0.001) if item is not None] == list(range(len(pauses)))

    uvloop.run(test())


def test_with_heartbeats_when_the_stream_fails_raises_its_error_after_the_items() -> None:
    async def test() -> None:
        feed = Feed()
        for item in (1, OSError("gone")):
            feed.queue.put_nowait(item)
        beats = with_heartbeats(feed.items(), NEVER_S)
        assert await anext(beats) == 1
        with pytest.raises(OSError, match="gone"):
            await anext(beats)
        with pytest.raises(StopAsyncIteration):
            await anext(beats)

    run(test)


@pytest.mark.parametrize("num_read", [0, 1, 2])
def test_with_heartbeats_when_closed_early_leaves_no_task_and_lets_the_owner_close_the_items(num_read: int) -> None:
    async def test() -> None:
        feed = Feed()
        feed.queue.put_nowait(1)
        async with contextlib.aclosing(feed.items()) as items:
            beats = with_heartbeats(items, 0.001)
            assert [await anext(beats) for _ in range(num_read)] == [1, None][:num_read]
            await beats.aclose()
            assert asyncio.all_tasks() == {asyncio.current_task()}
        assert feed.ended or num_read == 0  # a generator that never began has no `finally` to run

    run(test)


@pytest.mark.parametrize("turns", range(6))
def test_with_heartbeats_when_the_reader_is_cancelled_ends_the_wait_and_the_items_finally_runs(turns: int) -> None:
    async def test() -> None:
        feed = Feed()

        async def read() -> None:
            async with contextlib.aclosing(feed.items()) as items, contextlib.aclosing(with_heartbeats(items, NEVER_S)) as beats:
                async for _ in beats:
                    pass

        reader = asyncio.create_task(read())
        await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    run(test)


def test_with_heartbeats_when_the_items_fail_while_it_is_closed_leaves_no_error_unseen() -> None:
    async def test() -> None:
        async def items() -> AsyncIterator[int]:
            try:
                await asyncio.Event().wait()
                yield 1
            finally:
                raise OSError("while cleaning up")

        beats = with_heartbeats(items(), 0.001)
        assert await anext(beats) is None
        await beats.aclose()

    run(test)


def test_listening_when_a_peer_speaks_in_time_goes_on_and_ends_once_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(streams, "SILENCE_S", 0.05)

    async def test() -> None:
        listening, ticks = Listening(), 0

        def on_tick() -> None:
            nonlocal ticks
            ticks += 1
            if ticks % 4 == 0 and ticks < 20:
                listening.heard()

        await listening.wait_silence(on_tick)
        assert ticks == 16 + 5

    run(test)


def test_listening_when_this_process_stood_still_does_not_blame_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after SIGSTOP and SIGCONT: much time has passed, in which nobody here could have heard anything."""
    monkeypatch.setattr(streams, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(streams, "SILENCE_S", 0.05)

    async def test() -> None:
        listening = Listening()
        waiting = asyncio.ensure_future(listening.wait_silence())
        await asyncio.sleep(0.015)
        time.sleep(0.2)  # noqa: ASYNC251
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])

    run(test)
