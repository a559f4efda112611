"""Starts sender processes, lets them begin together, gathers what they tell. Knows nothing of requests or of what is shown."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import msgspec

from loadtest.files import BadInput, unwrapped
from loadtest.records import RequestRecord
from loadtest.run.job import Job, Progress, Start
from services.mesh.child_process import bound_to_parent

START_DELAY_S = 0.3  # for all to hear of it
_LINE_BYTES = 1 << 28  # longest line of a sender: records of a fifth of a second
_decoder = msgspec.json.Decoder(Progress)


@dataclass(slots=True)
class Tally:
    """How far a run is; grows while it goes on. `start_s` is time.monotonic()'s."""

    start_s: float = 0.0
    started: asyncio.Event = field(default_factory=asyncio.Event)
    sent: list[int] = field(default_factory=list)  # by sender
    open: list[int] = field(default_factory=list)
    records: list[RequestRecord] = field(default_factory=list)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.start_s


@contextlib.asynccontextmanager
async def senders(jobs: Sequence[Job]) -> AsyncIterator[Sequence[asyncio.subprocess.Process]]:
    """Processes that have prepared their shares. Raises BadInput for what one of them cannot do; all are gone at the end."""
    processes: list[asyncio.subprocess.Process] = []
    try:
        for job in jobs:
            command = bound_to_parent([sys.executable, "-m", "loadtest.run.sender", msgspec.json.encode(job).decode()])
            processes.append(
                await asyncio.create_subprocess_exec(
                    *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_LINE_BYTES, process_group=0
                )
            )
        for process in processes:
            await _next(process)
        yield processes
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*(process.wait() for process in processes))


async def conduct(processes: Sequence[asyncio.subprocess.Process], tally: Tally) -> None:
    """Starts the clock and returns when all answers have ended; `tally` grows meanwhile."""
    tally.start_s = time.monotonic() + START_DELAY_S
    tally.sent, tally.open = [0] * len(processes), [0] * len(processes)
    tally.started.set()
    line = msgspec.json.encode(Start(start_s=tally.start_s)) + b"\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(line)
    with unwrapped():
        async with asyncio.TaskGroup() as tasks:
            for number, process in enumerate(processes):
                tasks.create_task(_follow(number, process, tally))
    tally.records.sort(key=lambda record: record.index)


async def _follow(number: int, process: asyncio.subprocess.Process, tally: Tally) -> None:
    while True:
        progress = await _next(process)
        tally.sent[number], tally.open[number] = progress.num_sent, progress.num_open
        tally.records.extend(progress.records)
        if progress.is_done:
            return


async def _next(process: asyncio.subprocess.Process) -> Progress:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise BadInput(f"a sender ended (status {await process.wait()}); what it said stands above")
    progress = _decoder.decode(line)
    if progress.error:
        raise BadInput(progress.error)
    return progress
