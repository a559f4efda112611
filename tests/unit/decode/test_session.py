"""One router's session on a decode worker: a real engine, and prefill workers that do what the test wants."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protos.baton.v1 import common_pb2, decode_pb2
from services.core.errors import BatonError, EngineStopped, PeerUnavailable
from services.core.types import FinishReason, SampledToken, SamplingParams, TokenEvent
from services.decode.remote_prefill import PrefillClient, PrefillFailed, PrefillOutcome
from services.decode.session import LOAD_INTERVAL_S, MAX_UNREAD_TOKENS, RouterSession
from services.engine.engine import Engine
from services.engine.events import Event, Reserved
from services.engine.kv_groups import KVGroups
from services.engine.loader import load_model
from services.engine.settings import EngineSettings
from services.engine.stats import EngineStats
from services.mesh import convert
from tests.unit.engine.conftest import BLOCK_BYTES, write_checkpoint
from tests.waiting import wait_until

PROMPT = list(range(10, 50))  # two blocks and a half


class Peers(PrefillClient):
    """Prefill workers: each call is answered by the next of `answers`."""

    def __init__(self, *answers: Callable[[Sequence[int]], Awaitable[PrefillOutcome]]) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[str, int, int]] = []  # worker, first block, places

    async def run(
        self,
        start: decode_pb2.Start,
        candidate: decode_pb2.PrefillCandidate,
        block_ids: Sequence[int],
        *,
        first_block: int,
        ready_at: float,
    ) -> PrefillOutcome:
        self.calls.append((candidate.worker_id, first_block, len(block_ids)))
        return await self.answers.pop(0)(block_ids)


def outcome(*token_ids: int) -> Callable[[Sequence[int]], Awaitable[PrefillOutcome]]:
    async def answer(block_ids: Sequence[int]) -> PrefillOutcome:
        return PrefillOutcome(first_tokens=tuple(SampledToken(token_id, None) for token_id in token_ids), facts=decode_pb2.Prefilled())

    return answer


def failure(cause: BaseException, *, num_landed: int = 0) -> Callable[[Sequence[int]], Awaitable[PrefillOutcome]]:
    async def answer(block_ids: Sequence[int]) -> PrefillOutcome:
        raise PrefillFailed(num_landed=num_landed, unfenced=None) from cause

    return answer


async def forever(block_ids: Sequence[int]) -> PrefillOutcome:
    """As PrefillClient does when it is cancelled."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError as cancel:
        raise PrefillFailed(num_landed=0, unfenced=None) from cancel
    raise AssertionError


class Bench:
    """A session, its engine, and what it has told the router so far."""

    def __init__(self, engine: Engine, session: RouterSession) -> None:
        self.engine = engine
        self.session = session
        self._handle = 0

    def start(self, *, candidates: Sequence[str] = ("p0",), local_prefill_tokens: int = 0, **sampling: Any) -> decode_pb2.Start:
        fields: dict[str, Any] = {"seed": 1, "ignore_eos": True, "max_tokens": 6, **sampling}
        start = decode_pb2.Start(
            handle=self._handle,
            request_id=f"request-{self._handle}",
            attempt=1,
            token_ids=convert.token_ids_to_proto(PROMPT),
            sampling=convert.sampling_to_proto(SamplingParams(**fields)),
            candidates=[decode_pb2.PrefillCandidate(worker_id=name, address=name) for name in candidates],
            local_prefill_tokens=local_prefill_tokens,
            sent_unix_s=time.time(),
        )
        self._handle += fields.get("n", 1)
        self.session._start(start)
        return start

    def told(self) -> decode_pb2.StepFrame:
        return self.session._frame.take(None)

    async def prefilled(self) -> decode_pb2.Prefilled:
        """What is told of the next prompt that is computed."""
        while True:
            await asyncio.sleep(0.001)
            if told := self.told().prefilled:
                return told[0]

    async def tokens_to_the_end(self) -> list[int]:
        """All that is told up to the good end of a request."""
        token_ids: list[int] = []
        while True:
            await asyncio.sleep(0.005)
            frame = self.told()
            token_ids += convert.unpack_u32(frame.token_ids)
            if frame.endings:
                assert not frame.endings[0].HasField("error"), frame
                return token_ids

    async def wait_free(self) -> EngineStats:
        """Until the engine has nothing of anybody."""

        def is_free() -> bool:
            stats = self.engine.stats()
            return stats.blocks_owned + stats.num_reserved + stats.num_running + stats.num_waiting == 0

        await wait_until(is_free, timeout_s=5.0)
        return self.engine.stats()


def run(tmp_path: Path, main: Callable[[Bench], Awaitable[None]], peers: PrefillClient | None = None) -> None:
    core = load_model(write_checkpoint(tmp_path), EngineSettings(block_size=16, kv_memory_bytes=64 * BLOCK_BYTES, max_num_seqs=8)).core

    async def bounded() -> None:
        async with asyncio.timeout(30), Engine(core, max_num_requests=4) as engine, asyncio.TaskGroup() as tasks:
            session = RouterSession(fake_worker(engine), peers or Peers(), tasks, name="r#1")
            try:
                await main(Bench(engine, session))
            finally:
                session.close()

    asyncio.run(bounded())


def fake_worker(engine: Any) -> Any:
    load = common_pb2.WorkerLoad()
    return SimpleNamespace(
        engine=engine, draining=False, worker_id="d0", groups=KVGroups((None,), 16), kv_bytes_received=0, load=lambda: load
    )


def test_prefill_when_a_worker_fails_is_tried_on_the_next_behind_what_has_landed(tmp_path: Path) -> None:
    peers = Peers(failure(PeerUnavailable("p0 died"), num_landed=1), outcome(7))

    async def main(bench: Bench) -> None:
        bench.start(candidates=("p0", "p1"))
        token_ids = await bench.tokens_to_the_end()
        assert peers.calls == [("p0", 0, 3), ("p1", 1, 2)]
        assert token_ids[0] == 7 and len(token_ids) == 6
        await bench.wait_free()

    run(tmp_path, main, peers)


@pytest.mark.parametrize("num_landed", [0, 2, 3])
def test_prefill_when_all_workers_fail_is_computed_here(tmp_path: Path, num_landed: int) -> None:
    """Also when every block came and only the end of the call did not: then nobody else is asked."""
    peers = Peers(failure(PeerUnavailable("p0 died"), num_landed=num_landed), failure(PeerUnavailable("p1 died")))

    async def main(bench: Bench) -> None:
        bench.start(candidates=("p0", "p1"))
        assert len(await bench.tokens_to_the_end()) == 6
        assert len(peers.calls) == (1 if num_landed == 3 else 2)
        await bench.wait_free()

    run(tmp_path, main, peers)


def test_prefill_when_its_first_tokens_cannot_be_goes_on_elsewhere_and_costs_nobody_else(tmp_path: Path) -> None:
    peers = Peers(outcome(), outcome(1 << 20))

    async def main(bench: Bench) -> None:
        bench.start(candidates=("p0", "p1"))
        assert len(await bench.tokens_to_the_end()) == 6

    run(tmp_path, main, peers)


@pytest.mark.parametrize("when", ["with the reservation", "later"])
def test_cancel_while_a_peer_prefills_frees_the_reservation(tmp_path: Path, when: str) -> None:
    """A task that is cancelled before its first step runs none of its code."""

    async def main(bench: Bench) -> None:
        hear, reserved = bench.session._hear, asyncio.Event()

        def hear_and_cancel(events: Sequence[Event]) -> None:
            hear(events)
            if isinstance(events[0], Reserved):
                reserved.set()
                if when == "with the reservation":
                    bench.session._cancel(0)

        bench.session._hear = hear_and_cancel  # type: ignore[method-assign]
        bench.start()
        await reserved.wait()
        if when == "later":
            await asyncio.sleep(0.05)
            bench.session._cancel(0)
        stats = await bench.wait_free()
        assert stats.decode_tokens == 0

    run(tmp_path, main, Peers(forever))


def test_cancel_while_a_failed_prefill_is_fenced_is_not_forgotten(tmp_path: Path) -> None:
    class Transfer:
        num_landed_leading = 0

        async def fence(self, timeout_s: float) -> bool:
            await asyncio.sleep(0.1)
            return True

    class Receiver:
        def grant(self, block_ids: Sequence[int]) -> Transfer:
            return Transfer()

    class DyingPeer(PrefillClient):
        async def _call(self, *arguments: Any) -> PrefillOutcome:
            raise PeerUnavailable("p0 died")

    peers = DyingPeer(Receiver(), layout_fingerprint=b"")  # type: ignore[arg-type]

    async def main(bench: Bench) -> None:
        bench.start()
        await wait_until(lambda: bench.session._by_handle[0].prefilling is not None)
        await asyncio.sleep(0.03)
        bench.session._cancel(0)
        await asyncio.sleep(0.2)
        assert (await bench.wait_free()).decode_tokens == 0

    run(tmp_path, main, peers)


@pytest.mark.parametrize("way", ["alone", "rather here", "after a failure", "after no answer"])
def test_stages_when_the_prompt_is_computed_here_leave_no_gap_from_send_to_first_token(tmp_path: Path, way: str) -> None:
    async def nothing(block_ids: Sequence[int]) -> PrefillOutcome:
        await asyncio.sleep(0.03)
        return await (failure(PeerUnavailable("p0 died")) if way == "after a failure" else outcome())(block_ids)

    async def main(bench: Bench) -> None:
        start = bench.start(candidates=() if way == "alone" else ("p0",), local_prefill_tokens=100 if way == "rather here" else 0)
        told = await bench.prefilled()
        stages = (told.to_decode_s, told.decode_queue_s, told.prefill_retry_s, told.prefill_queue_s, told.prefill_s)
        assert min(stages) >= 0.0 and told.prefill_s > 0.0
        assert sum(stages) == pytest.approx(told.first_token_unix_s - start.sent_unix_s, abs=2e-4)
        assert (told.prefill_queue_s > 0.0) == (way != "alone")
        assert (told.prefill_retry_s >= 0.03) == way.startswith("after") == (told.prefill_attempts == 1)

    run(tmp_path, main, Peers(nothing))


class ScriptedEngine:
    """Hears requests and says what the test wants."""

    def __init__(self) -> None:
        self.aborted: list[str] = []

    def reserve(self, request: Any, *, listener: Callable[[Sequence[Event]], None]) -> None:
        self.tell = listener

    submit = reserve

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


@contextlib.asynccontextmanager
async def scripted(peers: PrefillClient) -> AsyncIterator[tuple[ScriptedEngine, Bench]]:
    engine = ScriptedEngine()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        session = RouterSession(fake_worker(engine), peers, tasks, name="r#1")
        try:
            yield engine, Bench(engine, session)  # type: ignore[arg-type]
        finally:
            session.close()


def token(choice: int, position: int, finish_reason: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(
        request_id="r#1/0", choice=choice, token_id=5, position=position, logprobs=None, finish_reason=finish_reason, cached_tokens=0
    )


def test_engine_when_it_dies_ends_the_prefill_that_a_peer_makes_for_it() -> None:
    async def main() -> None:
        async with scripted(Peers(forever)) as (engine, bench):
            bench.start()
            engine.tell(
                [Reserved(request_id="r#1/0", block_ids=(1, 2, 3), num_cached_tokens=0, queue_s=0.0, reserved_at=time.perf_counter())]
            )
            await asyncio.sleep(0.05)
            prefilling = bench.session._by_handle[0].prefilling
            engine.tell([EngineStopped("the engine failed")])
            assert prefilling is not None
            await asyncio.wait([prefilling], timeout=1.0)
            assert prefilling.cancelled()
            assert bench.told().endings[0].error.reason == "ENGINE_STOPPED"

    asyncio.run(main())


def test_error_when_the_first_choice_has_ended_names_one_that_the_router_still_knows() -> None:
    async def main() -> None:
        async with scripted(Peers()) as (engine, bench):
            bench.start(candidates=(), n=2)
            engine.tell([token(0, 40, FinishReason.STOP), token(1, 40)])
            bench.told()
            engine.tell([EngineStopped("the engine failed")])
            assert [ending.handle for ending in bench.told().endings] == [1]

    asyncio.run(main())


def test_frames_when_a_first_token_is_told_leave_the_load_to_a_later_one(tmp_path: Path) -> None:
    async def main(bench: Bench) -> None:
        async with contextlib.aclosing(bench.session.frames()) as frames:
            assert (await anext(frames)).HasField("load")  # of an idle session
            bench.start(max_tokens=200)
            frame = await anext(frames)
            assert frame.prefilled and not frame.HasField("load")
            others = [await anext(frames) for _ in range(10)]
            while not others[-1].HasField("load"):
                others.append(await anext(frames))

    run(tmp_path, main, Peers(outcome(5)))


def test_frames_when_other_requests_run_carry_the_load_beside_a_first_token(tmp_path: Path) -> None:
    async def main(bench: Bench) -> None:
        async with contextlib.aclosing(bench.session.frames()) as frames:
            assert (await anext(frames)).HasField("load")
            bench.start(max_tokens=200)
            assert (await anext(frames)).prefilled
            bench.start(max_tokens=200)
            frame = decode_pb2.StepFrame()
            while not frame.prefilled:
                await asyncio.sleep(2 * LOAD_INTERVAL_S)
                frame = await anext(frames)
            assert frame.HasField("load")

    run(tmp_path, main, Peers(outcome(5), outcome(5)))


def test_router_when_it_does_not_read_is_cut_off() -> None:
    """The session's task stands in a write that nobody takes; a task of its group ends it."""

    async def main() -> None:
        async with scripted(Peers()) as (engine, bench):
            bench.start(candidates=())
            engine.tell([token(0, 40 + index) for index in range(MAX_UNREAD_TOKENS + 1)])
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(main())
    (error,) = caught.value.exceptions
    assert isinstance(error, BatonError) and error.reason == "RESOURCE_EXHAUSTED"
