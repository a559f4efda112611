"""generate() over decode workers that say what the test wants: who is tried next, with what, and who never is."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from protos.baton.v1 import common_pb2, decode_pb2
from services.core.errors import BatonError, EngineStopped, InvalidRequest, Overloaded, PeerUnavailable, QueueFull
from services.core.prefix_index import PrefixIndex
from services.core.types import FinishReason, SamplingParams
from services.mesh import convert, status
from services.mesh.discovery import WorkerRecord
from services.router.admission import Admission
from services.router.fleet import Fleet
from services.router.generation import Generator
from services.router.members import Members
from services.router.request import Delta, GenerationRequest, Piece
from services.router.route import Route
from tests.unit.router.scripted_worker import IDENTITY, LOAD, Worker, tokens
from tests.unit.router.test_members import Announcements
from tests.unit.router.test_run import PROMPT, Words
from tests.waiting import wait_until


class Bench:
    """A router over scripted workers, which come and go."""

    def __init__(self, generator: Generator, members: Members, discovery: Announcements) -> None:
        self._generator, self._members, self._discovery = generator, members, discovery
        self._records: dict[str, WorkerRecord] = {}
        self.generator = generator

    async def join(self, name: str, address: str) -> None:
        self._records[name] = WorkerRecord(worker_id=name, epoch=1, role="decode", address=address)
        self._discovery.announce(*self._records.values())
        await wait_until(lambda: any(worker.worker.worker_id == name and worker.state == "up" for worker in self._members.status().workers))

    def ask(self, *, n: int = 1) -> "asyncio.Future[list[Piece]]":
        sampling = SamplingParams(max_tokens=6, seed=7, n=n)
        request = GenerationRequest(
            request_id="r", prompt_token_ids=PROMPT, sampling=sampling, received_at=time.perf_counter(), tokenize_s=0.0
        )

        async def pieces() -> list[Piece]:
            return [piece async for piece in self._generator.generate(request)]

        return asyncio.ensure_future(pieces())


@contextlib.asynccontextmanager
async def bench(*, recovery_s: float = 10.0, admission: Admission | None = None) -> AsyncIterator[Bench]:
    replica: Any = SimpleNamespace(index=PrefixIndex(), synchronized=True)
    discovery = Announcements()
    members = Members(discovery, replica, router_id="r", served_model_name=None)
    tokenizer: Any = Words()
    generator = Generator(
        members, replica, tokenizer, admission or Admission(max_in_flight=8), router_id="r", max_local_tokens=None, recovery_s=recovery_s
    )
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(members.run())
        yield Bench(generator, members, discovery)
        discovery.announce()
        await wait_until(lambda: not members.status().workers)
        following.cancel()


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(bounded())


def named(name: str, **identity: Any) -> Worker:
    worker = Worker()
    worker.welcome.worker.worker_id = name
    if identity:
        model = common_pb2.ModelIdentity()
        model.CopyFrom(IDENTITY)
        for field, value in identity.items():
            setattr(model, field, value)
        worker.welcome.model.CopyFrom(model)
    return worker


def starts(worker: Worker) -> list[decode_pb2.Start]:
    return [command.start for session in worker.commands for command in session if command.HasField("start")]


def ended(frame: decode_pb2.StepFrame, handle: int) -> decode_pb2.StepFrame:
    frame.endings.add(handle=handle, finish_reason=convert.finish_reason_to_proto(FinishReason.LENGTH))
    return frame


def failed(handle: int, error: BatonError) -> decode_pb2.StepFrame:
    frame = decode_pb2.StepFrame(load=LOAD)
    frame.endings.add(handle=handle, error=status.to_proto(error, "r"))
    return frame


def token_ids(pieces: list[Piece], choice: int = 0) -> list[int]:
    return [token_id for piece in pieces if isinstance(piece, Delta) and piece.choice == choice for token_id in piece.token_ids]


@pytest.mark.parametrize("error", [EngineStopped("died"), QueueFull("full"), InvalidRequest("max_tokens", "too many here")], ids=str)
def test_request_when_its_worker_fails_goes_on_elsewhere_from_what_has_come(error: BatonError) -> None:
    async def main() -> None:
        first, second = named("d0"), named("d1")
        async with bench() as mesh, first.serving() as address, second.serving() as other:
            await mesh.join("d0", address)
            asking = mesh.ask()
            await wait_until(lambda: starts(first))
            first.frames.put_nowait(tokens(0, 40, 5, 6))
            await mesh.join("d1", other)
            first.frames.put_nowait(failed(0, error))
            await wait_until(lambda: starts(second))
            [start] = starts(second)
            assert convert.unpack_u32(start.token_ids.packed) == [*PROMPT, 5, 6]
            assert (start.prompt_length, start.attempt, start.sampling.seed, start.sampling.max_tokens) == (40, 2, 7, 6)
            second.frames.put_nowait(ended(tokens(0, 42, 7, 8, 9, 10), 0))
            pieces = await asking
            assert token_ids(pieces) == [5, 6, 7, 8, 9, 10]
            assert mesh.generator.statistics.finished == 1

    run(main)


def test_request_when_its_first_tokens_are_its_last_teaches_how_they_came_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def spy_on(name: str) -> None:
        method = getattr(Fleet, name)

        def spy(fleet: Fleet, *arguments: Any, **options: Any) -> None:
            told.append(name)
            method(fleet, *arguments, **options)

        monkeypatch.setattr(Fleet, name, spy)

    for name in ("prefill_done", "finished"):
        spy_on(name)

    async def main() -> None:
        worker = named("d0")
        async with bench() as mesh, worker.serving() as address:
            await mesh.join("d0", address)
            asking = mesh.ask()
            await wait_until(lambda: starts(worker))
            worker.frames.put_nowait(ended(tokens(0, 40, 5, 6, 7, 8, 9, 10), 0))
            assert len(token_ids(await asking)) == 6
            assert told == ["prefill_done", "finished"] and not mesh.generator._lessons

    run(main)


def test_request_when_another_model_takes_over_is_not_finished_by_it() -> None:
    """A rollout: half an answer of the old weights and half of the new ones would be an answer of neither."""

    async def main() -> None:
        old, new = named("d0"), named("d1", model_fingerprint=b"other weights")
        async with bench(recovery_s=0.5) as mesh, new.serving() as address:
            async with old.serving() as old_address:
                await mesh.join("d0", old_address)
                asking = mesh.ask()
                await wait_until(lambda: starts(old))
                old.frames.put_nowait(tokens(0, 40, 5, 6))
                await asyncio.sleep(0.05)
            await mesh.join("d1", address)
            with pytest.raises(PeerUnavailable):
                await asking
            assert not starts(new)
            again = mesh.ask()
            await wait_until(lambda: starts(new))
            new.frames.put_nowait(ended(tokens(0, 40, 1, 2, 3, 4, 5, 6), 0))
            assert token_ids(await again) == [1, 2, 3, 4, 5, 6]

    run(main)


def test_choices_when_they_go_on_elsewhere_follow_the_longest_one() -> None:
    """They find their prompt cached then; at once, each would take room for all of it."""

    async def main() -> None:
        first, second = named("d0"), named("d1")
        async with bench() as mesh, first.serving() as address, second.serving() as other:
            await mesh.join("d0", address)
            asking = mesh.ask(n=3)
            await wait_until(lambda: starts(first))
            first.frames.put_nowait(tokens(0, 40, 5))
            first.frames.put_nowait(tokens(1, 40, 6, 7, 8))
            first.frames.put_nowait(ended(tokens(2, 40, 9), 2))
            await mesh.join("d1", other)
            first.frames.put_nowait(failed(0, EngineStopped("died")))
            await wait_until(lambda: starts(second))
            await asyncio.sleep(0.05)
            [longest] = starts(second)
            assert convert.unpack_u32(longest.token_ids.packed) == [*PROMPT, 6, 7, 8]
            second.frames.put_nowait(ended(tokens(longest.handle, 43, 1, 2, 3), longest.handle))
            await wait_until(lambda: len(starts(second)) == 2)
            other_start = starts(second)[1]
            assert convert.unpack_u32(other_start.token_ids.packed) == [*PROMPT, 5]
            second.frames.put_nowait(ended(tokens(other_start.handle, 41, 1, 2, 3, 4, 5), other_start.handle))
            pieces = await asking
            assert [token_ids(pieces, choice) for choice in range(3)] == [[5, 1, 2, 3, 4, 5], [6, 7, 8, 1, 2, 3], [9]]

    run(main)


class Choosy(Admission):
    """Lets the first request in, and nothing after it."""

    def __init__(self) -> None:
        super().__init__(max_in_flight=8)
        self.num_checks = 0
        self.noted: list[tuple[str, float]] = []

    def note_first_token(self, route: Route, ttft_s: float) -> None:
        self.noted.append((route.decode_worker_id, ttft_s))

    def check(self, route: Route, *, remaining_s: float | None = None) -> None:
        self.num_checks += 1
        if self.num_checks > 1:
            raise Overloaded("too late")


def test_request_when_it_goes_on_elsewhere_is_not_shed_once_it_was_accepted() -> None:
    async def main() -> None:
        first, second = named("d0"), named("d1")
        admission = Choosy()
        async with bench(admission=admission) as mesh, first.serving() as address, second.serving() as other:
            await mesh.join("d0", address)
            asking = mesh.ask()
            await wait_until(lambda: starts(first))
            await mesh.join("d1", other)
            first.frames.put_nowait(failed(0, EngineStopped("died")))
            await wait_until(lambda: starts(second))
            second.frames.put_nowait(ended(tokens(0, 40, 1, 2, 3, 4, 5, 6), 0))
            assert token_ids(await asking) == [1, 2, 3, 4, 5, 6]
            ((worker_id, ttft_s),) = admission.noted
            assert worker_id == "d1"
            assert 0.0 < ttft_s < 30.0

    run(main)
