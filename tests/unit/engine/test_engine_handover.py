"""Engine with its thread when prompts are computed for others and by others, and when one listener has many requests."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from services.core.errors import EngineStopped, InvalidRequest, QueueFull, UnknownRequest
from services.core.types import FinishReason, SampledToken, SamplingParams, TokenEvent
from services.engine.core import EngineCore
from services.engine.engine import Engine
from services.engine.events import Event, PrefillProgress, Reserved
from services.engine.sequence import EngineRequest
from tests.unit.engine.gate import TIMEOUT_S, Gate

MakeCore = Callable[..., EngineCore]
PROMPT = list(range(10, 50))
BLOCK_BYTES = 4096  # of the checkpoint in conftest.py


def make_request(request_id: str = "r", prompt: Sequence[int] = PROMPT, **sampling: Any) -> EngineRequest:
    fields: dict[str, Any] = {"seed": 1, "ignore_eos": True, "max_tokens": 12, **sampling}
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(**fields))


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await main()

    asyncio.run(bounded())


class Inbox:
    """A listener whose events can be awaited; remembers each call."""

    def __init__(self) -> None:
        self.calls: list[list[Event]] = []
        self._arrived = asyncio.Event()

    def hear(self, events: Sequence[Event]) -> None:
        self.calls.append(list(events))
        self._arrived.set()

    @property
    def events(self) -> list[Event]:
        return [event for call in self.calls for event in call]

    async def wait(self, enough: Callable[[list[Event]], bool]) -> list[Event]:
        """All events so far, once there are enough."""
        while not enough(self.events):
            self._arrived.clear()
            await self._arrived.wait()
        return self.events

    async def reserved(self) -> Reserved:
        events = await self.wait(bool)
        assert isinstance(events[0], Reserved)
        return events[0]

    async def token_ids(self, num_choices: int = 1) -> list[list[int | None]]:
        """By choice, once all have ended."""
        await self.wait(lambda events: sum(isinstance(e, TokenEvent) and e.finish_reason is not None for e in events) >= num_choices)
        tokens = [event for event in self.events if isinstance(event, TokenEvent)]
        return [[event.token_id for event in tokens if event.choice == choice] for choice in range(num_choices)]


async def generate(engine: Engine, request: EngineRequest) -> list[list[int | None]]:
    inbox = Inbox()
    engine.submit(request, listener=inbox.hear)
    return await inbox.token_ids(request.sampling.n)


async def settle(is_so: Callable[[], bool]) -> None:
    """Until the engine thread has obeyed; the test's own timeout ends what never comes."""
    while not is_so():  # noqa: ASYNC110  (the thread has nothing that could be awaited)
        await asyncio.sleep(0.001)


def copy_blocks(source: EngineCore, source_ids: Sequence[int], target: EngineCore, target_ids: Sequence[int]) -> None:
    for from_id, to_id in zip(source_ids, target_ids, strict=True):
        target._runner.pools[0][to_id] = source._runner.pools[0][from_id]


@pytest.mark.parametrize("n", [1, 3])
def test_landed_when_blocks_came_from_another_engine_gives_the_tokens_of_one_engine(make_core: MakeCore, n: int) -> None:
    source_core, target_core = make_core(prefill_chunk_tokens=16), make_core(kv_memory_bytes=20 * BLOCK_BYTES)
    request = make_request(n=n, temperature=1.5, logprobs=1)

    async def main() -> None:
        async with Engine(source_core, max_num_requests=4) as source, Engine(target_core, max_num_requests=4) as target:
            expected = await generate(source, request)
            inbox = Inbox()
            target.reserve(request, listener=inbox.hear)
            reserved = await inbox.reserved()
            assert (len(reserved.block_ids), reserved.num_cached_tokens) == (3, 0)
            computed = []
            async with source.prefill(make_request("another id", n=n, temperature=1.5, logprobs=1)) as steps:
                async for progress in steps:
                    computed.append(progress.num_computed_tokens)
                    if progress.first_tokens is not None:
                        break
                copy_blocks(source_core, progress.block_ids, target_core, reserved.block_ids)
                assert source.stats().blocks_owned == 3
            assert computed == [32, 40]
            assert progress.cached_tokens == 32  # from before
            assert progress.timing is not None and progress.timing.prefill_s >= progress.timing.model_s > 0
            assert progress.first_tokens is not None
            target.landed("r", progress.first_tokens)
            assert await inbox.token_ids(n) == expected
            assert target.stats().blocks_owned == target.stats().num_reserved == 0
            await settle(lambda: source.stats().num_held == source.stats().blocks_owned == 0)

    run(main)


@pytest.mark.parametrize("num_events", [0, 1, 2])
def test_prefill_when_left_early_frees_its_blocks(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch, num_events: int) -> None:
    core = make_core(prefill_chunk_tokens=16)

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=1) as engine:
            async with engine.prefill(make_request()) as steps:
                await gate.wait_step()
                assert engine.stats().blocks_owned == 3
                for _ in range(num_events):
                    gate.step()
                    assert (await anext(steps)).first_tokens is None
                    await gate.wait_step()
            gate.open()
            # Ids and room are there again, and the prompt is not computed any further.
            await settle(lambda: engine.stats().blocks_owned == 0)
            assert engine.stats().steps == num_events + 1
            assert await generate(engine, make_request(max_tokens=1))

    run(main)


def test_prefill_when_iterated_to_its_end_frees_its_blocks(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=1) as engine:
            async with engine.prefill(make_request()) as steps:
                events = [progress async for progress in steps]
                assert [event.first_tokens is not None for event in events] == [True]
                assert engine.stats().blocks_owned == 3
            await settle(lambda: engine.stats().blocks_owned == 0)

    run(main)


def test_prefill_when_the_output_would_not_fit_here_computes_the_prompt_all_the_same(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=1) as engine:
            request = make_request(prompt=[1] * 255, max_tokens=200)
            assert [progress.num_computed_tokens for progress in await _all(engine, request)] == [255]
            with pytest.raises(InvalidRequest, match="max_tokens"):
                engine.reserve(make_request("another", prompt=[1] * 255, max_tokens=200), listener=Inbox().hear)

    run(main)


def test_prefill_when_the_request_cannot_be_taken_raises_at_once(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=1) as engine:
            with pytest.raises(InvalidRequest, match="prompt"):
                await engine.prefill(make_request(prompt=[1] * 256)).__aenter__()
            async with engine.prefill(make_request()):
                with pytest.raises(QueueFull):
                    await engine.prefill(make_request("another")).__aenter__()

    run(main)


def test_prefill_when_aborted_from_elsewhere_ends_without_first_tokens(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=1) as engine:
            steps = asyncio.ensure_future(_all(engine, make_request()))
            await gate.wait_step()
            engine.abort("r")
            assert await steps == []
            gate.open()
            await settle(lambda: engine.stats().blocks_owned == 0)

    run(main)


async def _all(engine: Engine, request: EngineRequest) -> list[PrefillProgress]:
    async with engine.prefill(request) as steps:
        return [progress async for progress in steps]


def test_prefill_when_the_engine_ends_raises_engine_stopped(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=1) as engine:
            steps = asyncio.ensure_future(_all(engine, make_request()))
            await gate.wait_step()
            gate.fails = True
            gate.open()
            with pytest.raises(EngineStopped, match="the engine failed"):
                await steps

    run(main)


def test_reserve_when_places_are_taken_waits_in_the_same_bounded_queue(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(max_num_seqs=1), max_num_requests=3) as engine:
            first, second, third = Inbox(), Inbox(), Inbox()
            engine.reserve(make_request("1"), listener=first.hear)
            engine.reserve(make_request("2"), listener=second.hear)
            engine.submit(make_request("3"), listener=third.hear)
            with pytest.raises(QueueFull):
                engine.reserve(make_request("4"), listener=first.hear)
            await first.reserved()
            assert (second.calls, third.calls) == ([], [])
            engine.abort("1")
            await second.reserved()
            assert third.calls == []
            engine.compute_here("2")
            assert await second.token_ids() == await third.token_ids()
            assert [event.finish_reason for event in first.events[1:] if isinstance(event, TokenEvent)] == [FinishReason.ABORT]

    run(main)


def test_reserve_when_nothing_else_can_be_done_leaves_the_engine_thread_asleep(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(kv_memory_bytes=4 * BLOCK_BYTES)
    step, calls = core.step, []

    def counted(announce: Callable[[list[Event]], None] | None = None) -> list[Event]:
        calls.append(announce)
        return step(announce)

    monkeypatch.setattr(core, "step", counted)

    async def main() -> None:
        async with Engine(core, max_num_requests=4) as engine:
            first, second = Inbox(), Inbox()
            engine.reserve(make_request("1"), listener=first.hear)
            engine.submit(make_request("2", [1] * 20), listener=second.hear)
            await first.reserved()
            engine.abort("no such request")
            await settle(lambda: engine.stats().num_waiting == 1)
            before = len(calls)
            await asyncio.sleep(0.05)  # a thread that spins would come by thousands of times
            assert len(calls) <= before + 1
            engine.abort("1")
            assert len((await second.token_ids())[0]) == 12

    run(main)


def test_reserve_when_the_engine_thread_sleeps_is_answered_without_it(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    gate, add, threads = Gate(core, monkeypatch), core.add, []

    def added(*arguments: Any, **options: Any) -> None:
        threads.append(threading.current_thread().name)
        add(*arguments, **options)

    monkeypatch.setattr(core, "add", added)

    async def main() -> None:
        async with Engine(core, max_num_requests=4) as engine:
            idle, busy = Inbox(), Inbox()
            engine.reserve(make_request("1"), listener=idle.hear)
            assert (await idle.reserved()).num_cached_tokens == 0
            engine.submit(make_request("2"), listener=busy.hear)
            await gate.wait_step()
            late = Inbox()
            engine.reserve(make_request("3"), listener=late.hear)  # the engine thread is in a step: nobody else may touch the core
            await asyncio.sleep(0.01)
            assert not late.events
            gate.open()
            await late.reserved()
            for request_id in ("1", "3"):
                engine.abort(request_id)
            await busy.token_ids()

    run(main)
    assert threads == [threading.current_thread().name, "engine", "engine"]


def test_reserve_when_the_core_fails_ends_the_engine_like_a_failing_step(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a secret of the core")

    monkeypatch.setattr(core, "add", fail)

    async def main() -> None:
        async with Engine(core, max_num_requests=4) as engine:
            inbox = Inbox()
            engine.reserve(make_request(), listener=inbox.hear)
            (event,) = await inbox.wait(bool)
            assert isinstance(event, EngineStopped) and "secret" not in event.message
            await engine.wait_failed()
            with pytest.raises(EngineStopped):
                engine.submit(make_request("next"))

    run(main)


@pytest.mark.parametrize("later", [0, 1, 2, 3])
def test_landed_when_the_request_is_aborted_right_after_harms_nobody(make_core: MakeCore, later: int) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=4) as engine:
            inbox = Inbox()
            engine.reserve(make_request(), listener=inbox.hear)
            await inbox.reserved()
            engine.landed("r", [SampledToken(1, None)])
            for _ in range(later):  # turns of the loop, in one of which the engine thread is told
                await asyncio.sleep(0)
            engine.abort("r")
            assert await generate(engine, make_request("next"))
            await settle(lambda: engine.stats().blocks_owned == 0)

    run(main)


def test_landed_when_the_first_token_is_the_last_keeps_its_id_until_the_core_has_heard(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=4) as engine:
            inbox = Inbox()
            engine.reserve(make_request(max_tokens=1), listener=inbox.hear)
            await inbox.reserved()
            engine.landed("r", [SampledToken(1, None)])
            await inbox.wait(lambda events: len(events) == 2)
            with pytest.raises(InvalidRequest, match="in use"):
                engine.reserve(make_request(), listener=Inbox().hear)
            await settle(lambda: engine.stats().num_reserved == 0)
            again = Inbox()
            engine.reserve(make_request(), listener=again.hear)
            await again.reserved()
            assert len(again.events) == 1
            engine.abort("r")
            await settle(lambda: engine.stats().blocks_owned == 0)

    run(main)


def test_reserved_when_announced_comes_before_the_step_that_is_computed_meanwhile(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core()

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=4) as engine:
            inbox = Inbox()
            engine.submit(make_request("runs", max_tokens=5))
            await gate.wait_step()
            engine.reserve(make_request(), listener=inbox.hear)
            gate.step()
            await gate.wait_step()  # the second step is not computed yet
            assert (await inbox.reserved()).request_id == "r"
            assert engine.stats().steps == 1
            gate.open()

    run(main)


def test_compute_here_when_a_part_has_landed_computes_the_rest(make_core: MakeCore) -> None:
    source_core, target_core = make_core(), make_core()

    async def main() -> None:
        async with Engine(source_core, max_num_requests=4) as source, Engine(target_core, max_num_requests=4) as target:
            expected = await generate(source, make_request())
            inbox = Inbox()
            target.reserve(make_request(), listener=inbox.hear)
            reserved = await inbox.reserved()
            cached = source_core.pool.match_prefix(list(source_core.pool._block_of))[:2]
            copy_blocks(source_core, cached, target_core, reserved.block_ids[:2])
            target.compute_here("r", num_landed_tokens=35)
            assert await inbox.token_ids() == expected
            assert target.stats().prefill_tokens == 8
            first = inbox.events[1]
            assert isinstance(first, TokenEvent) and first.prefill is not None and first.prefill.model_s > 0

    run(main)


def test_quarantine_when_a_peer_may_still_write_returns_its_blocks_and_computes_in_others(make_core: MakeCore) -> None:
    core = make_core()

    async def main() -> None:
        async with Engine(core, max_num_requests=4) as engine:
            expected = await generate(engine, make_request())
            inbox = Inbox()
            engine.reserve(make_request(), listener=inbox.hear)
            reserved = await inbox.reserved()
            assert reserved.num_cached_tokens == 32
            block_ids = engine.quarantine("r")
            assert block_ids == reserved.block_ids[2:]
            core._runner.pools[0][list(block_ids)] = float("nan")
            assert await inbox.token_ids() == expected
            assert engine.stats().blocks_quarantined == 1
            engine.lift_quarantine(block_ids)
            await settle(lambda: engine.stats().blocks_quarantined == 0)

    run(main)


def test_quarantine_when_the_request_is_given_up_ends_it_and_keeps_the_blocks(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=4) as engine:
            inbox = Inbox()
            engine.reserve(make_request(n=2), listener=inbox.hear)
            reserved = await inbox.reserved()
            assert engine.quarantine("r", abort=True) == reserved.block_ids
            assert await inbox.token_ids(2) == [[None], [None]]
            await settle(lambda: engine.stats().blocks_quarantined == 3)
            stats = engine.stats()
            assert (stats.num_waiting, stats.num_reserved, stats.blocks_owned) == (0, 0, 0)
            engine.lift_quarantine(reserved.block_ids[:1])
            engine.lift_quarantine(reserved.block_ids[1:])
            await settle(lambda: engine.stats().blocks_free == 64)

    run(main)


def test_answers_when_the_request_is_gone_are_ignored(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=4) as engine:
            inbox = Inbox()
            engine.reserve(make_request(), listener=inbox.hear)
            await inbox.reserved()
            engine.abort("r")
            engine.landed("r", [SampledToken(1, None)])
            engine.compute_here("r")
            assert engine.quarantine("r") == ()
            assert await generate(engine, make_request("next"))

    run(main)


def test_answers_when_the_request_is_not_reserved_are_the_caller_s_fault_and_do_no_harm(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=4) as engine:
            inbox = Inbox()
            engine.reserve(make_request(), listener=inbox.hear)
            with pytest.raises(AssertionError, match="'r' is not reserved"):
                engine.compute_here("r")
            reserved = await inbox.reserved()
            with pytest.raises(AssertionError):
                engine.lift_quarantine(reserved.block_ids)
            with pytest.raises(InvalidRequest, match="first_tokens"):
                engine.landed("r", [])
            with pytest.raises(InvalidRequest, match="first_tokens"):
                engine.landed("r", [SampledToken(128, None)])
            engine.compute_here("r")
            with pytest.raises(AssertionError):
                engine.landed("r", [SampledToken(1, None)])
            with pytest.raises(AssertionError):
                engine.quarantine("r")
            assert len((await inbox.token_ids())[0]) == 12

    run(main)


def test_listener_when_it_has_many_requests_is_called_once_per_step(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=8) as engine:
            inbox = Inbox()
            engine.submit(make_request("first", [3], max_tokens=1))  # so that the others come together
            await gate.wait_step()
            for index in range(6):
                engine.submit(make_request(str(index), [index + 1] * 5, max_tokens=4), listener=inbox.hear)
            gate.open()
            await inbox.wait(lambda events: len(events) == 24)
            assert [len(call) for call in inbox.calls] == [6] * 4
            for index in range(6):
                events = [event for event in inbox.events if isinstance(event, TokenEvent) and event.request_id == str(index)]
                assert [event.position for event in events] == [5, 6, 7, 8]
            assert engine.stats().steps == 5

    run(main)


def test_listener_when_its_request_is_aborted_hears_the_end_and_nothing_after_it(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core()

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=8) as engine:
            inbox = Inbox()
            engine.submit(make_request(n=2), listener=inbox.hear)
            await gate.wait_step()
            engine.abort("r")
            assert inbox.calls == []  # never from inside a call
            gate.open()
            assert await generate(engine, make_request("next"))
            assert [[(event.choice, event.finish_reason) for event in call if isinstance(event, TokenEvent)] for call in inbox.calls] == [
                [(0, FinishReason.ABORT), (1, FinishReason.ABORT)]
            ]

    run(main)


@pytest.mark.parametrize("fails", [False, True])
def test_listener_when_the_engine_ends_hears_it_once(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    core = make_core()

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        inbox = Inbox()
        async with Engine(core, max_num_requests=8) as engine:
            for index in range(3):
                engine.submit(make_request(str(index), max_tokens=100), listener=inbox.hear)
            engine.reserve(make_request("reserved"), listener=inbox.hear)
            await gate.wait_step()
            gate.fails = fails
            gate.open()
            if fails:
                await inbox.wait(lambda events: isinstance(events[-1] if events else None, EngineStopped))
        last = inbox.calls[-1]
        assert [str(event) for event in last] == ["the engine failed" if fails else "the engine is closed"]
        assert sum(isinstance(event, EngineStopped) for event in inbox.events) == 1

    run(main)


def test_stream_when_the_request_has_a_listener_is_not_to_be_read(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=8) as engine:
            inbox = Inbox()
            engine.submit(make_request(max_tokens=2), listener=inbox.hear)
            with pytest.raises(UnknownRequest, match="no request 'r' is to be read here"):
                await anext(engine.stream("r"))
            assert len((await inbox.token_ids())[0]) == 2

    run(main)


def test_on_blocks_when_replayed_gives_what_the_pool_holds(make_core: MakeCore) -> None:
    core = make_core(kv_memory_bytes=12 * BLOCK_BYTES)
    held: set[bytes] = set()
    num_removed = 0

    def on_blocks(stored: list[bytes], removed: list[bytes]) -> None:
        nonlocal held, num_removed
        assert stored or removed
        assert held.issuperset(removed) and held.isdisjoint(stored)
        held = (held - set(removed)) | set(stored)
        num_removed += len(removed)

    async def main() -> None:
        async with Engine(core, max_num_requests=8, on_blocks=on_blocks) as engine:
            for index in range(8):
                await generate(engine, make_request(str(index), [index % 5] * 40, max_tokens=30))
            inbox = Inbox()
            engine.reserve(make_request("reserved", [9] * 40), listener=inbox.hear)
            await inbox.reserved()
            before = set(held)
            engine.landed("reserved", [SampledToken(1, None)])
            await inbox.token_ids()
            assert len(held - before) >= 2  # published once they had landed
        assert held == set(core.pool._block_of)
        assert num_removed > 0

    run(main)
