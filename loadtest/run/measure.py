"""One run: senders prepared, started together, watched, struck by faults, and what remains when all is over."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live

from loadtest.files import unwrapped
from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.run.conductor import Tally, conduct, senders
from loadtest.run.discovery import Server
from loadtest.run.faults import Fault, Strike, Striker
from loadtest.run.job import Job
from loadtest.run.live import LiveView, plain_line
from loadtest.run.watch import Watch, watching
from loadtest.schedule import Schedule

FRAMES_PER_S = 4
PLAIN_EVERY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of a run, whatever it sends. shows: a live view; else a line now and then, where there is a console at all."""

    server: Server
    objective: Objective
    num_senders: int
    timeout_s: float
    prompt_seed: int
    console: Console | None
    shows: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """
    records    of all requests of the schedule, those too that were never sent
    held       KV blocks that still belonged to somebody at the end, by worker; None: the target does not say
    """

    records: Sequence[RequestRecord]
    strikes: Sequence[Strike]
    held: dict[str, int] | None
    watch: Watch | None
    duration_s: float


async def measure(schedule: Schedule, path: Path, settings: Settings, faults: Sequence[Fault] = ()) -> Measured:
    """Sends the schedule, which is stored at `path`, and follows every request to its end. Raises BadInput for what cannot be done."""
    jobs = [
        Job(
            schedule=str(path),
            target=settings.server.target,
            sender=number,
            num_senders=settings.num_senders,
            timeout_s=settings.timeout_s,
            prompt_seed=settings.prompt_seed,
        )
        for number in range(settings.num_senders)
    ]
    tally = Tally()
    arrivals_s = max((request.at_s for request in schedule.requests), default=0.0)
    async with contextlib.AsyncExitStack() as stack:
        watch = await stack.enter_async_context(watching(settings.server.router)) if settings.server.router else None
        processes = await stack.enter_async_context(senders(jobs))
        if watch is not None:
            await watch.seen.wait()
        strikes: list[Strike] = []
        await stack.enter_async_context(_shown(settings, schedule, tally, watch, strikes))
        with unwrapped():
            async with asyncio.TaskGroup() as tasks:
                striking = tasks.create_task(_strike(faults, watch, tally, arrivals_s, strikes)) if faults else None
                await conduct(processes, tally)
                if striking is not None:
                    striking.cancel()
        held = None if watch is None else await watch.wait_settled()
    records = _all_records(schedule, tally.records)
    return Measured(records=records, strikes=strikes, held=held, watch=watch, duration_s=max(arrivals_s, _span_s(records)))


def _span_s(records: Sequence[RequestRecord]) -> float:
    """Until the last arrival: later turns of sessions come when they come."""
    return max((record.at_s for record in records if record.outcome is not Outcome.UNSENT), default=0.0)


def _all_records(schedule: Schedule, records: Sequence[RequestRecord]) -> list[RequestRecord]:
    by_index = {record.index: record for record in records}
    return [
        by_index.get(index)
        or RequestRecord(
            index=index,
            at_s=request.at_s,
            session=request.session,
            tenant=request.tenant,
            input_tokens=request.input_tokens,
            planned_tokens=request.output_tokens,
        )
        for index, request in enumerate(schedule.requests)
    ]


async def _strike(faults: Sequence[Fault], watch: Watch | None, tally: Tally, end_s: float, strikes: list[Strike]) -> None:
    assert watch is not None
    await tally.started.wait()
    striker = Striker(faults, watch, start_s=tally.start_s, end_s=end_s, strikes=strikes)
    await striker.run()


@contextlib.asynccontextmanager
async def _shown(
    settings: Settings, schedule: Schedule, tally: Tally, watch: Watch | None, strikes: Sequence[Strike]
) -> AsyncIterator[None]:
    if settings.console is None:
        yield
        return
    if settings.shows:
        view = LiveView(schedule, settings.objective, tally, watch, strikes)
        with Live(view, console=settings.console, refresh_per_second=FRAMES_PER_S, transient=True):
            yield
        return
    console = settings.console

    def say() -> None:
        console.print(plain_line(tally, len(schedule), settings.objective), highlight=False)

    task = asyncio.ensure_future(_every(PLAIN_EVERY_S, say))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def _every(seconds: float, action: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        action()
