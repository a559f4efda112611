"""Engine with its thread and a real tiny model: what a reader sees when a request ends, is aborted, or the engine is gone.

The engine thread is held at chosen steps by a gate in front of the model, so that nothing here depends on who is faster.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from services.core.errors import EngineStopped, InvalidRequest, QueueFull, UnknownRequest
from services.core.noise import choice_seed
from services.core.types import FinishReason, SamplingParams, TokenEvent
from services.engine.core import EngineCore
from services.engine.engine import Engine
from services.engine.sequence import EngineRequest
from tests.unit.engine.gate import TIMEOUT_S, Gate

MakeCore = Callable[..., EngineCore]
PROMPT = list(range(10, 30))
EOS = 2  # of the checkpoint in conftest.py


def make_request(request_id: str = "r", *, prompt: Sequence[int] = PROMPT, **sampling: Any) -> EngineRequest:
    fields: dict[str, Any] = {"seed": 1, "ignore_eos": True, **sampling}
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(**fields))


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Runs a test's coroutine on a loop of its own, with an end to all waiting."""

    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await main()

    asyncio.run(bounded())


async def read(engine: Engine, request_id: str = "r") -> list[TokenEvent]:
    return [event async for event in engine.stream(request_id)]


async def generate(engine: Engine, request: EngineRequest) -> list[TokenEvent]:
    engine.submit(request)
    return await read(engine, request.request_id)


def token_ids(events: Sequence[TokenEvent], choice: int = 0) -> list[int | None]:
    return [event.token_id for event in events if event.choice == choice]


def check_balance(engine: Engine, *, owned: int | None = None) -> None:
    stats = engine.stats()
    assert stats.blocks_free + stats.blocks_cached + stats.blocks_owned + stats.blocks_quarantined == stats.blocks_total
    assert owned is None or stats.blocks_owned == owned


def test_stream_when_read_to_the_end_gives_every_token_and_frees_the_blocks(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=4) as engine:
            events = await generate(engine, make_request(max_tokens=9))
            assert [event.position for event in events] == list(range(20, 29))
            assert [event.finish_reason for event in events] == [None] * 8 + [FinishReason.LENGTH]
            check_balance(engine, owned=0)
            stats = engine.stats()
            assert (stats.steps, stats.decode_tokens, stats.num_running, stats.num_waiting) == (9, 8, 0, 0)
            assert await generate(engine, make_request(max_tokens=9, prompt=[1])) != events  # the id is free again

    run(main)


def test_stream_when_a_token_stops_the_sequence_ends_with_stop(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=4) as engine:
            stopped = await generate(engine, make_request(ignore_eos=False, logit_bias={EOS: 100.0, 7: 50.0}, min_tokens=2))
            assert token_ids(stopped) == [7, 7, EOS]
            assert stopped[-1].finish_reason is FinishReason.STOP
            ignored = await generate(engine, make_request(logit_bias={EOS: 100.0}, max_tokens=3))
            assert token_ids(ignored) == [EOS] * 3
            assert ignored[-1].finish_reason is FinishReason.LENGTH

    run(main)


def test_stream_when_many_requests_run_at_once_gives_each_its_own_tokens(make_core: MakeCore) -> None:
    requests = [make_request(str(n), prompt=[n + 1] * (5 * n + 1), max_tokens=10 + n, seed=n) for n in range(8)]

    async def main() -> None:
        async with Engine(make_core(), max_num_requests=8) as engine:
            alone = [await generate(engine, request) for request in requests]
            together = await asyncio.gather(*(generate(engine, request) for request in requests))
            for request, first, second in zip(requests, alone, together, strict=True):
                assert token_ids(second) == token_ids(first)
                assert {event.request_id for event in second} == {request.request_id}
            check_balance(engine, owned=0)

    run(main)


def test_stream_when_a_request_has_several_choices_ends_after_the_last_of_them(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(max_num_seqs=2), max_num_requests=4) as engine:
            events = await generate(engine, make_request(n=5, max_tokens=6, seed=4))
            assert sum(event.finish_reason is not None for event in events) == 5
            for choice in range(5):
                single = await generate(engine, make_request(max_tokens=6, seed=choice_seed(4, choice)))
                assert token_ids(events, choice) == token_ids(single)
            check_balance(engine, owned=0)

    run(main)


def test_stream_when_repeated_with_the_same_seed_gives_the_same_tokens(make_core: MakeCore) -> None:
    async def main() -> None:
        runs = []
        for _ in range(2):
            async with Engine(make_core(), max_num_requests=4) as engine:
                runs.append(token_ids(await generate(engine, make_request(max_tokens=30, seed=99))))
        assert runs[0] == runs[1]

    run(main)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_stream_when_left_early_aborts_the_request_within_a_step(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    core = make_core(prefill_chunk_tokens=16)  # two steps for the prompt

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=4) as engine:
            engine.submit(make_request(max_tokens=100, n=2))
            stream = engine.stream("r")
            assert isinstance(stream, AsyncGenerator)
            async with aclosing(stream):
                first = asyncio.ensure_future(anext(stream))
                for _ in range(num_steps):
                    await gate.wait_step()
                    gate.step()
                await gate.wait_step()
                assert engine.stats().blocks_owned > 0
                if num_steps < 2:  # no token yet
                    first.cancel()
                    await asyncio.wait([first])
                else:
                    assert (await first).position == 20
            # The step that was running when the reader left is the last.
            engine.submit(make_request("next", max_tokens=1))
            gate.open()
            assert len(await read(engine, "next")) == 1
            check_balance(engine, owned=0)
            assert engine.stats().steps <= num_steps + 1 + 2
            with pytest.raises(UnknownRequest):
                await read(engine)

    run(main)


def test_stream_when_its_task_is_cancelled_aborts_the_request(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=1) as engine:
            reader = asyncio.create_task(generate(engine, make_request(max_tokens=100)))
            await gate.wait_step()
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            gate.open()
            await generate(engine, make_request("next", max_tokens=1))  # and there is room again
            check_balance(engine, owned=0)
            assert engine.stats().steps <= 2

    run(main)


def test_abort_when_a_reader_waits_ends_its_stream(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=4) as engine:
            reader = asyncio.create_task(generate(engine, make_request(max_tokens=100)))
            await gate.wait_step()
            engine.abort("r")
            gate.open()
            await generate(engine, make_request("next", max_tokens=5))  # five steps later
            done, _ = await asyncio.wait([reader], timeout=0.2)
            reader.cancel()
            assert done
            assert [event.finish_reason for event in reader.result() if event.finish_reason] in ([], [FinishReason.ABORT])

    run(main)


def test_abort_when_a_request_runs_frees_its_blocks_before_the_next_step(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=4) as engine:
            engine.submit(make_request(max_tokens=100, n=3))
            engine.submit(make_request("other", prompt=[5], max_tokens=5))
            for _ in range(2):
                await gate.wait_step()
                gate.step()
            await gate.wait_step()
            assert engine.stats().num_running == 4
            engine.abort("r")
            engine.abort("r")
            engine.abort("no such request")
            gate.step()
            await gate.wait_step()
            assert (engine.stats().steps, engine.stats().num_running) == (3, 1)
            check_balance(engine, owned=1)
            gate.open()
            assert len(await read(engine, "other")) == 5
            check_balance(engine, owned=0)

    run(main)


def test_submit_when_an_aborted_id_is_used_again_waits_for_the_running_step(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the running step makes for the old request must not land in the new one's stream."""
    core = make_core()

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=4) as engine:
            engine.submit(make_request(max_tokens=5))
            await gate.wait_step()
            engine.abort("r")
            with pytest.raises(InvalidRequest, match="request_id"):
                engine.submit(make_request(prompt=[5] * 3, max_tokens=2))
            gate.open()
            await generate(engine, make_request("next", max_tokens=5))
            events = await generate(engine, make_request(prompt=[5] * 3, max_tokens=2))
            assert [event.position for event in events] == [3, 4]

    run(main)


def test_submit_when_the_engine_is_full_raises_queue_full_until_a_request_ends(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=2) as engine:
            engine.submit(make_request("a", max_tokens=3))
            engine.submit(make_request("b", max_tokens=3))
            with pytest.raises(QueueFull, match="2 requests are running or waiting") as caught:
                engine.submit(make_request("c", max_tokens=3))
            assert caught.value.retry_after_s > 0
            assert len(await read(engine, "a")) == 3
            assert len(await generate(engine, make_request("c", max_tokens=3))) == 3
            assert len(await read(engine, "b")) == 3

    run(main)


def test_submit_when_the_id_is_in_use_raises_and_leaves_the_first_alone(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=4) as engine:
            engine.submit(make_request(max_tokens=3))
            with pytest.raises(InvalidRequest, match="'r' is in use") as caught:
                engine.submit(make_request(max_tokens=5))
            assert caught.value.field == "request_id"
            assert len(await read(engine)) == 3

    run(main)


@pytest.mark.parametrize(
    ("fields", "field", "limit"),
    [
        ({"prompt": []}, "prompt", 1),
        ({"prompt": [1] * 256}, "prompt", 255),
        ({"prompt": [1, 128]}, "prompt", 127),
        ({"prompt": [-1]}, "prompt", 127),
        ({"temperature": float("nan")}, "temperature", "[0.0, 100.0]"),
        ({"max_tokens": 237}, "max_tokens", 236),
        ({"n": 0}, "n", "[1, 128]"),
    ],
)
def test_submit_when_a_request_is_invalid_raises_and_keeps_nothing(
    make_core: MakeCore, fields: dict[str, Any], field: str, limit: object
) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=1) as engine:
            with pytest.raises(InvalidRequest) as caught:
                engine.submit(make_request(**fields))
            assert (caught.value.field, caught.value.limit) == (field, limit)
            assert len(await generate(engine, make_request(max_tokens=1))) == 1

    run(main)


@pytest.mark.parametrize("extreme", [{"top_k": 2**70}, {"seed": 2**64 - 1}, {"min_tokens": 2**70}, {"top_p": 5e-324, "min_p": 1.0}])
def test_submit_when_a_valid_parameter_is_extreme_does_not_harm_the_engine(make_core: MakeCore, extreme: dict[str, Any]) -> None:
    """top_k 2**70 was valid and ended the engine thread, and with it everybody's requests."""

    async def main() -> None:
        async with Engine(make_core(), max_num_requests=4) as engine:
            assert len(await generate(engine, make_request(prompt=[1] * 250, **extreme))) == 6
            assert len(await generate(engine, make_request(max_tokens=2))) == 2

    run(main)


def test_stream_when_the_request_is_unknown_raises(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=4) as engine:
            with pytest.raises(UnknownRequest, match="no request 'r' is to be read here"):
                await read(engine)
            engine.submit(make_request(max_tokens=2))
            await read(engine)
            with pytest.raises(UnknownRequest):  # a stream is read once
                await read(engine)

    run(main)


def test_close_when_requests_run_or_wait_ends_all_their_streams_with_engine_stopped(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(max_num_seqs=1)

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=4) as engine:
            readers = [asyncio.create_task(generate(engine, make_request(str(n), max_tokens=100))) for n in range(3)]
            await gate.wait_step()
            gate.open()
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert [(type(result), str(result)) for result in results] == [(EngineStopped, "the engine is closed")] * 3
        with pytest.raises(EngineStopped):
            engine.submit(make_request("late", max_tokens=1))
        engine.abort("0")
        assert not engine._thread.is_alive()

    run(main)


def test_close_when_nothing_runs_ends_the_thread(make_core: MakeCore) -> None:
    async def main() -> None:
        async with Engine(make_core(), max_num_requests=4) as engine:
            assert engine._thread.is_alive()
        assert not engine._thread.is_alive()

    run(main)


def test_close_when_the_body_raises_passes_the_error_on(make_core: MakeCore) -> None:
    async def main() -> None:
        engine = Engine(make_core(), max_num_requests=4)

        async def fail() -> None:
            async with engine:
                engine.submit(make_request(max_tokens=100))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        assert not engine._thread.is_alive()

    run(main)


def test_engine_when_its_thread_dies_tells_every_reader_without_the_cause(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = make_core(max_num_seqs=1)

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=4) as engine:
            readers = [asyncio.create_task(generate(engine, make_request(str(n), max_tokens=100))) for n in range(3)]
            for _ in range(3):
                await gate.wait_step()
                gate.step()
            await gate.wait_step()
            gate.fails = True
            gate.open()
            results = await asyncio.gather(*readers, return_exceptions=True)
            for result in results:
                assert isinstance(result, EngineStopped)
                assert str(result) == "the engine failed"
                assert result.__cause__ is result.__context__ is None
            with pytest.raises(EngineStopped, match="the engine failed"):
                engine.submit(make_request("late", max_tokens=1))
            engine.abort("0")
        with pytest.raises(EngineStopped, match="the engine failed"):  # closing it later does not change the reason
            engine.submit(make_request("late", max_tokens=1))

    run(main)
    assert "a secret of the engine thread" in caplog.text  # for those who read the log


def test_engine_when_it_dies_between_submit_and_stream_tells_the_reader_that_it_stopped(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader got UnknownRequest, which nobody retries, for a request that had been taken in."""
    core = make_core()

    async def main() -> None:
        gate = Gate(core, monkeypatch)
        async with Engine(core, max_num_requests=4) as engine:
            engine.submit(make_request("first", max_tokens=100))
            await gate.wait_step()
            engine.submit(make_request("second", max_tokens=100))
            gate.fails = True
            gate.open()
            for request_id in ("first", "second"):
                with pytest.raises(EngineStopped):
                    await read(engine, request_id)

    run(main)


def test_stream_when_its_reader_comes_after_the_end_has_lost_no_event(make_core: MakeCore) -> None:
    core = make_core()

    async def main() -> None:
        async with Engine(core, max_num_requests=4) as engine:
            engine.submit(make_request("early", max_tokens=7))
            engine.submit(make_request("late", prompt=[1], max_tokens=20))
            assert len(await read(engine, "late")) == 20
            assert len(await read(engine, "early")) == 7

    run(main)


def test_facts_of_the_engine_when_asked_for_are_those_of_its_core(make_core: MakeCore) -> None:
    engine = Engine(make_core(max_model_len=64), max_num_requests=4)
    assert (engine.max_model_len, engine.vocab_size) == (64, 128)
