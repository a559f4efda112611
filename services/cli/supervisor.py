"""Runs processes by their specs: starts them, notices when they serve, starts again those that die, stops them in order.

    starting ─▶ running: who dies is started again, later and later while it dies young ─▶ stopping: stage by stage, SIGTERM, then SIGKILL

A process that dies while the mesh starts is an error: the mesh has never worked, and starting it again would only hide why. Every process
has a process group of its own (Ctrl-C reaches the supervisor alone) and dies with it, even by kill -9. Knows nothing of what they are.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from services.cli.log_tail import last_lines
from services.core.errors import PeerUnavailable
from services.mesh.child_process import bound_to_parent

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.1, 5.0
STEADY_S = 30.0  # who has lived this long is not in a crash loop
CRASH_LOOP = 5  # young deaths in a row
PROBE_INTERVAL_S = 0.1
SLOW_STOP_S = 1.0  # who takes longer is said to drain


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """
    name, role    "decode-0", "decode"; a role's processes are started and stopped together
    command       absolute path of the program, and its arguments
    environment   all of it
    is_serving    asks once whether the process serves
    """

    name: str
    role: str
    command: Sequence[str]
    environment: Mapping[str, str]
    is_serving: Callable[[], Awaitable[bool]]


class Backoff:
    """How long to wait before a process that has died is started again; `num_young_deaths` counts those in a row."""

    def __init__(self) -> None:
        self.num_young_deaths = 0

    def after(self, lived_s: float) -> float:
        """Seconds to wait after a life of `lived_s`: longer after each early death, short again after one that lasted."""
        self.num_young_deaths = 1 if lived_s >= STEADY_S else self.num_young_deaths + 1
        return float(min(FIRST_BACKOFF_S * 2 ** min(self.num_young_deaths - 1, 16), LONGEST_BACKOFF_S))


@dataclass(slots=True, kw_only=True, eq=False)
class _Child:
    spec: ProcessSpec
    log: Path
    process: asyncio.subprocess.Process | None = None
    serving: asyncio.Event = field(default_factory=asyncio.Event)
    backoff: Backoff = field(default_factory=Backoff)


class Supervisor:
    """`async with`: leaving stops everything, the roles of a stage together, the stages one after another within `stop_timeout_s` each.

    `report(name, words)` is told what happens to whom. Until keep_alive() is called a death ends the block with PeerUnavailable, and
    leaving kills at once, for nobody has been served yet. For the main thread's event loop: children die with the thread that made them.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        stages: Sequence[Collection[str]],
        log_dir: Path,
        report: Callable[[str, str], None],
        stop_timeout_s: float,
    ) -> None:
        assert {spec.role for spec in specs} <= {role for stage in stages for role in stage}
        self._children = [_Child(spec=spec, log=log_dir / f"{spec.name}.log") for spec in specs]
        self._stages = stages
        self._report = report
        self._stop_timeout_s = stop_timeout_s
        self._keeps_alive = False
        self._stopping = asyncio.Event()
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if self._keeps_alive:
                await self._stop()
        finally:
            self.kill()
            await asyncio.gather(*(child.process.wait() for child in self._children if child.process is not None))
            try:
                await self._tasks.__aexit__(kind, error, traceback)
            except ExceptionGroup as group:
                raise group.exceptions[0] from None  # the others came of it

    async def start(self, *roles: str) -> None:
        """Starts the processes of these roles and returns when all of them serve."""
        children = [child for child in self._children if child.spec.role in roles]
        for child in children:
            self._tasks.create_task(self._keep(child))
        for child in children:
            await child.serving.wait()

    def keep_alive(self) -> None:
        """The start is over: from now on who dies is started again."""
        self._keeps_alive = True

    def kill(self) -> None:
        """Ends everything at once; nothing is started any more."""
        self._stopping.set()
        for pid in self.pids.values():
            _signal_group(pid, signal.SIGKILL)

    @property
    def pids(self) -> dict[str, int]:
        """Of the processes that run now, by name."""
        return {child.spec.name: child.process.pid for child in self._children if child.process and child.process.returncode is None}

    async def _stop(self) -> None:
        self._stopping.set()
        for stage in self._stages:
            children = [child for child in self._children if child.spec.role in stage and child.spec.name in self.pids]
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[child.spec.name], signal.SIGTERM)
            if not await self._wait_ended(children, min(SLOW_STOP_S, self._stop_timeout_s)):
                self._report_running(children, "draining")
                if not await self._wait_ended(children, self._stop_timeout_s - SLOW_STOP_S):
                    self._report_running(children, f"has not stopped within {self._stop_timeout_s:g} s: killed")
                    for pid in [self.pids[child.spec.name] for child in children if child.spec.name in self.pids]:
                        _signal_group(pid, signal.SIGKILL)
                    await self._wait_ended(children, None)

    async def _wait_ended(self, children: Sequence[_Child], timeout_s: float | None) -> bool:
        """Whether all of them have ended within the time; reports those that end."""
        running = {
            asyncio.ensure_future(child.process.wait()): child.spec.name
            for child in children
            if child.process is not None and child.spec.name in self.pids
        }
        pending = set(running)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while pending:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended, pending = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                self._report(running[task], "stopped")
            if not ended:
                break
        for task in pending:
            task.cancel()
        return not pending

    def _report_running(self, children: Sequence[_Child], words: str) -> None:
        for child in children:
            if child.spec.name in self.pids:
                self._report(child.spec.name, words)

    async def _keep(self, child: _Child) -> None:
        """Runs a process and its successors until the supervisor stops."""
        while not self._stopping.is_set():
            started_at = time.monotonic()
            try:
                status = await self._run_once(child, started_at)
            except OSError as error:  # no descriptor, no process, no log folder any more
                if not self._keeps_alive:
                    raise PeerUnavailable(f"{child.spec.name} cannot be started: {error}") from error
                self._report(child.spec.name, f"cannot be started: {error}")
                status = os.EX_OSERR
            if self._stopping.is_set():
                return
            if not self._keeps_alive:
                raise PeerUnavailable(_obituary(child, status))
            backoff_s = child.backoff.after(time.monotonic() - started_at)
            deaths = child.backoff.num_young_deaths
            if (words := death_notice(deaths, status, backoff_s)) is not None:
                self._report(child.spec.name, words if deaths < CRASH_LOOP else f"{words}\n{_obituary(child, status)}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self._stopping.wait()

    async def _run_once(self, child: _Child, started_at: float) -> int:
        spec = child.spec
        # The log goes on over restarts; the child has its own copy of the descriptor.
        child.log.parent.mkdir(parents=True, exist_ok=True)
        with child.log.open("ab") as log:
            child.process = await asyncio.create_subprocess_exec(
                *bound_to_parent(spec.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(spec.environment),
                process_group=0,
            )
        if self._stopping.is_set():  # it was being born while the others were killed
            _signal_group(child.process.pid, signal.SIGKILL)
        self._report(spec.name, "starting")
        watching = self._tasks.create_task(self._watch_serving(child, started_at))
        try:
            return await child.process.wait()
        finally:
            watching.cancel()
            await asyncio.wait((watching,))

    async def _watch_serving(self, child: _Child, started_at: float) -> None:
        while True:
            if await child.spec.is_serving():
                break
            await asyncio.sleep(PROBE_INTERVAL_S)
        self._report(child.spec.name, f"serving after {time.monotonic() - started_at:.1f} s")
        child.serving.set()


def death_notice(num_young_deaths: int, status: int, backoff_s: float) -> str | None:
    """What to say of a death that came after so many early ones, itself included; None: it would only be said again."""
    if num_young_deaths < CRASH_LOOP:
        return f"{how_it_ended(status)}; starts again in {backoff_s:g} s"
    if num_young_deaths % CRASH_LOOP == 0:
        return f"crash loop: died {num_young_deaths} times in a row, starts again in {backoff_s:g} s"
    return None


def how_it_ended(status: int) -> str:
    """An exit status or a signal, in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def _obituary(child: _Child, status: int) -> str:
    lines = last_lines(child.log)
    words = f"{child.spec.name} {how_it_ended(status)}; its last words, from {child.log}:"
    return "\n    ".join([words, *(lines or ["none"])])


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
