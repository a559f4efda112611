"""One cell: requests under way, a fault at a step, and what became of them, of the mesh's memory, and of the service that was struck."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM

import grpc

from protos.baton.v1 import common_pb2
from services.mesh.failpoints import Arming
from tests.faults.cluster import DECODES, PREFILLS, ROUTERS, TRANSPORTS, Cluster, Usage
from tests.faults.matrix import PLACES, Cell, Fault
from tests.faults.workload import BACKGROUND, PROBE, Answer, Request, ask, difference, with_stop_string
from tests.waiting import wait_until

ANSWER_TIMEOUT_S = 30.0
NOTICE_S = 5.0  # within which a frozen worker must have been noticed
FREED_S, FREED_AFTER_CLIENT_S = 2.0, 1.0
FROZEN_S = 4.0  # of a process whose silence nobody can go on without
USED_AGAIN_S = 60.0  # a process starts in three seconds on a machine of its own
SETTLED_S = 5.0  # for sockets and threads of connections that have ended


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a cell came to; `ended`: requests that a lost router ends with UNAVAILABLE by necessity, and those of a client that is late.

    leaked        blocks, requests, descriptors and threads that are still held when all is quiet
    freed_s       from the last answer until nothing was held for any of the requests
    recovered_s   from a restart, a thaw, the end of a slow link, or the fault itself, until the service did its part again
    """

    wrong: int = 0
    lost: int = 0
    ended: int = 0
    leaked: int = 0
    noticed_s: float | None = None
    freed_s: float | None = None
    recovered_s: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.notes


class Matrix:
    """Runs cells on one cluster. `prepare()` first: it learns `right`, the answers to `background` and the probe, by the request's id()."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._probe = PROBE
        self.background: list[Request] = []
        self.right: dict[int, Answer] = {}
        self._most: dict[str, Usage] = {}  # what a process of a role holds when all its connections are there

    async def prepare(self) -> None:
        """Undisturbed answers, twice: what differs between two such runs could not be held against a fault."""
        first = await self._ask_all([*BACKGROUND, PROBE])
        stopped = with_stop_string(BACKGROUND[0], first[0])
        self.background = [*BACKGROUND, stopped]
        requests = [*self.background, PROBE]
        runs = [await self._ask_all(requests) for _ in range(3)]
        assert all(answer.code is None for run in runs for answer in run), [answer.details for run in runs for answer in run]
        for run in runs[1:]:
            assert [difference(answer, right) for answer, right in zip(run, runs[0], strict=True)] == [None] * len(requests)
        assert len(runs[0][-2].tokens[0]) < len(runs[0][0].tokens[0]), "the stop string ends it"
        self.right = {id(request): answer for request, answer in zip(requests, runs[0], strict=True)}
        met: set[tuple[str, str]] = set()
        while len(met) < len(PREFILLS) * len(DECODES):
            answers = await self._ask_all(self.background)
            met |= {(answer.timing.prefill_worker_id, answer.timing.decode_worker_id) for answer in answers}
        for name in self._cluster.services:
            usage, role = self._cluster.usage(name), name.partition("-")[0]
            most = self._most.get(role, usage)
            self._most[role] = Usage(
                pid=0,
                descriptors=max(usage.descriptors, most.descriptors),
                threads=max(usage.threads, most.threads),
                rss_bytes=max(usage.rss_bytes, most.rss_bytes),
            )

    async def run(self, cell: Cell) -> Outcome:
        """Strikes, looks, and leaves the cluster whole."""
        outcome = Outcome()
        strike = _Strike(self._cluster, cell, self._probe, self.background, outcome)
        try:
            answers = await strike.run()
            self._judge(cell, answers, outcome)
            await self._check_freed(cell, strike, outcome)
            await self._check_recovery(cell, strike, outcome)
        finally:
            await strike.cancel()
            await self._cluster.mend()
        for words in await self.wait_usage():
            outcome.leaked += 1
            outcome.notes.append(f"leaked: {words}")
        return outcome

    async def _ask_all(self, requests: Sequence[Request]) -> list[Answer]:
        stubs = [self._cluster.stub(router) for router in ROUTERS]
        return list(await asyncio.gather(*(ask(stubs[number % 2], request) for number, request in enumerate(requests))))

    def _judge(self, cell: Cell, answers: Sequence[tuple[str, Request, Answer]], outcome: Outcome) -> None:
        for router, request, answer in answers:
            if (words := difference(answer, self.right[id(request)])) is not None:
                outcome.wrong += 1
                outcome.notes.append(f"wrong: {words}")
            if answer.code is None:
                continue
            router_is_lost = cell.service == "router" and router == "router-1" and cell.fault in (Fault.KILL, Fault.RESTART, Fault.RESET)
            due = {Fault.CANCEL: grpc.StatusCode.CANCELLED, Fault.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED}.get(
                cell.fault, grpc.StatusCode.UNAVAILABLE if router_is_lost else None
            )
            if answer.code is due and (answer.code is not grpc.StatusCode.UNAVAILABLE or answer.retry_after_s > 0):
                outcome.ended += 1
            else:
                outcome.lost += 1
                outcome.notes.append(f"lost at {router}: {answer.code.name}: {answer.details}")

    async def _check_freed(self, cell: Cell, strike: "_Strike", outcome: Outcome) -> None:
        limit_s = FREED_AFTER_CLIENT_S if cell.service == "client" else FREED_S
        router = "router-0"
        deadline = strike.over_at + max(limit_s, SETTLED_S)
        held = "never asked"
        while time.monotonic() < deadline:
            held = await self.held(router)
            if not held:
                outcome.freed_s = time.monotonic() - strike.over_at
                break
            await asyncio.sleep(0.01)
        if held:
            outcome.leaked += 1
            outcome.notes.append(f"leaked: {held}")
        elif outcome.freed_s is not None and outcome.freed_s > limit_s:
            outcome.notes.append(f"freed after {outcome.freed_s:.1f} s, not {limit_s} s")

    async def held(self, router: str) -> str:
        """What is still held for requests anywhere, in words; empty: nothing."""
        status = await self._cluster.status(router)
        words = [f"{status.in_flight} requests in {router}"] if status.in_flight else []
        for worker in status.workers:
            words += _imbalance(worker.worker.worker_id, worker.load)
        return "; ".join(words)

    async def _check_recovery(self, cell: Cell, strike: "_Strike", outcome: Outcome) -> None:
        since = await strike.undo()
        try:
            async with asyncio.timeout(USED_AGAIN_S + ANSWER_TIMEOUT_S):
                await self._cluster.wait_whole()
                while not await self._is_used(strike.victim, outcome):  # noqa: ASYNC110 - another process decides
                    await asyncio.sleep(0.02)
        except (TimeoutError, AssertionError) as error:
            outcome.notes.append(f"not recovered: {error}")
        else:
            outcome.recovered_s = time.monotonic() - since
            if outcome.recovered_s > USED_AGAIN_S:
                outcome.notes.append(f"recovered after {outcome.recovered_s:.1f} s")

    async def _is_used(self, victim: str | None, outcome: Outcome) -> bool:
        """Whether requests that are sent now succeed, and some of them by way of the victim. Whole: nobody may fail them any more."""
        router = victim if victim in ROUTERS else ROUTERS[0]
        requests = self.background[:3]
        answers = await asyncio.gather(*(ask(self._cluster.stub(router), request, timeout_s=ANSWER_TIMEOUT_S) for request in requests))
        for request, answer in zip(requests, answers, strict=True):
            if answer.code is not None and victim not in ROUTERS:
                outcome.lost += 1
                outcome.notes.append(f"lost after recovery: {answer.code.name}: {answer.details}")
            if (words := difference(answer, self.right[id(request)])) is not None:
                outcome.wrong += 1
                outcome.notes.append(f"wrong after recovery: {words}")
        met = {worker for answer in answers for worker in (answer.timing.prefill_worker_id, answer.timing.decode_worker_id)}
        return all(answer.code is None for answer in answers) and (victim not in PREFILLS + DECODES or victim in met)

    async def wait_usage(self) -> list[str]:
        """Which processes hold more descriptors or threads than they did when all their connections were there, and go on doing so."""
        with contextlib.suppress(AssertionError):
            await wait_until(lambda: not self._more_usage(), SETTLED_S)
        return self._more_usage()

    def _more_usage(self) -> list[str]:
        words = []
        for name in self._cluster.services:
            usage, most = self._cluster.usage(name), self._most[name.partition("-")[0]]
            if name != "redis" and (usage.descriptors > most.descriptors or usage.threads > most.threads):
                words.append(f"{name}: {usage.descriptors} descriptors of {most.descriptors}, {usage.threads} threads of {most.threads}")
                words.append(f"{name} is connected {self._cluster.connections(name)}")
        return words


class _Strike:
    """The requests and the fault of one cell."""

    def __init__(self, cluster: Cluster, cell: Cell, probe: Request, background: Sequence[Request], outcome: Outcome) -> None:
        self._cluster = cluster
        self._cell = cell
        self._probe = probe
        self._others = background if cell.service != "client" else ()
        self._outcome = outcome
        self._tasks: list[tuple[str, Request, asyncio.Task[Answer]]] = []
        self.victim: str | None = None
        self.over_at = 0.0  # time.monotonic() when the last answer was there

    async def run(self) -> list[tuple[str, Request, Answer]]:
        """Every request with its router and what became of it."""
        if self._cell.block:
            await self._damage()
        else:
            await self._strike_at_step()
        _, late = await asyncio.wait([task for _, _, task in self._tasks], timeout=ANSWER_TIMEOUT_S)
        self.over_at = time.monotonic()
        answers = []
        for router, request, task in self._tasks:
            if task in late:
                self._outcome.lost += 1
                self._outcome.notes.append(f"lost at {router}: no end within {ANSWER_TIMEOUT_S} s")
            elif not task.cancelled():
                answers.append((router, request, task.result()))
        return answers

    async def cancel(self) -> None:
        for _, _, task in self._tasks:
            task.cancel()
        await asyncio.gather(*(task for _, _, task in self._tasks), return_exceptions=True)

    async def undo(self) -> float:
        """Ends what the fault still does; time.monotonic() of the moment from which recovery counts."""
        cluster, victim = self._cluster, self.victim
        if victim is None:
            return self.over_at
        if self._cell.fault is Fault.TERM:
            status = await cluster.wait_ended(victim, ANSWER_TIMEOUT_S)
            if status != 0:
                self._outcome.notes.append(f"{victim} ended with {status}")
        for proxy in cluster.services[victim].proxies:
            proxy.is_slow = False
        since = time.monotonic()
        if not cluster.services[victim].is_running:
            cluster.launch(victim)
            await cluster.wait_serving(victim)
        elif self._cell.fault in (Fault.RESET, Fault.RESTART):
            return self._struck_at
        return since

    def _send(self, router: str, request: Request, request_id: str = "", timeout_s: float | None = None) -> asyncio.Task[Answer]:
        task = asyncio.ensure_future(ask(self._cluster.stub(router), request, request_id=request_id, timeout_s=timeout_s))
        self._tasks.append((router, request, task))
        return task

    async def _damage(self) -> None:
        """Damages a block of whichever request is next on that transport; sends requests until it has happened."""
        point = f"kv.{self._cell.service}_block"
        action = "corrupt" if self._cell.fault is Fault.CORRUPT else "drop"
        self._cluster.arm("prefill", point, Arming(action=action, nth=self._cell.block))
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while not self._cluster.struck_at("prefill", point):
                tasks = [self._send(ROUTERS[number % 2], self._probe) for number in range(len(TRANSPORTS))]
                await asyncio.wait(tasks)
        self._cluster.disarm("prefill", point)

    async def _strike_at_step(self) -> None:
        cluster, cell = self._cluster, self._cell
        role, point, nth = PLACES[cell.step]
        request_id = f"probe-{uuid.uuid4().hex}"
        action = "error" if cell.fault is Fault.ERROR else "pause"
        if cell.fault is Fault.STUCK:
            point, nth = "kv.inside_block", 1  # several blocks go at a time
        cluster.arm(role, point, Arming(action=action, nth=nth, request_id=None if cell.fault is Fault.STUCK else request_id))
        for request in self._others:
            self._send("router-0", request)
        probe = self._send("router-1", self._probe, request_id, timeout_s=1.5 if cell.fault is Fault.DEADLINE else None)
        if cell.fault is Fault.ERROR:
            await wait_until(lambda: cluster.struck_at(role, point), ANSWER_TIMEOUT_S)
            cluster.disarm(role, point)
            return
        await wait_until(lambda: cluster.paused_at(role, point) is not None or probe.done(), ANSWER_TIMEOUT_S)
        assert cluster.paused_at(role, point) is not None, f"{cell} was not reached: {probe.result()}"
        self.victim = await self._choose_victim(cluster.paused_at(role, point))
        self._struck_at = time.monotonic()
        if cell.fault is Fault.STUCK:
            await self._hold(NOTICE_S)
            cluster.disarm(role, point)
            return
        thawing = await self._hurt(probe)
        cluster.disarm(role, point)
        await thawing

    async def _choose_victim(self, paused: str | None) -> str | None:
        """The one that has to do with the request at the step; any, where none has."""
        service = self._cell.service
        if service in ("kv_index", "redis"):
            return service
        if service in ("client", "router"):
            return "router-1" if service == "router" else None
        if paused is not None and paused.startswith(service):
            return paused
        status = await self._cluster.status("router-1")
        busy = [worker.worker.worker_id for worker in status.workers if worker.role == service and worker.in_flight]
        return busy[0] if busy else f"{service}-0"

    async def _hurt(self, probe: asyncio.Task[Answer]) -> "asyncio.Future[None]":
        """Does it; the future ends when the fault may end."""
        cluster, victim = self._cluster, self.victim
        match self._cell.fault:
            case Fault.CANCEL:
                probe.cancel()
            case Fault.DEADLINE:
                await asyncio.wait([probe])
            case Fault.KILL | Fault.RESTART:
                assert victim is not None
                cluster.send(victim, SIGKILL)
                await cluster.wait_ended(victim, ANSWER_TIMEOUT_S)
                if self._cell.fault is Fault.RESTART:
                    cluster.launch(victim)
            case Fault.FREEZE:
                assert victim is not None
                cluster.send(victim, SIGSTOP)
                return asyncio.ensure_future(self._thaw(victim))
            case Fault.TERM:
                assert victim is not None
                cluster.send(victim, SIGTERM)
            case Fault.RESET | Fault.SLOW:
                assert victim is not None
                for proxy in cluster.services[victim].proxies:
                    if self._cell.fault is Fault.RESET:
                        proxy.reset()
                    else:
                        proxy.is_slow = True
        return asyncio.ensure_future(asyncio.sleep(0))

    async def _thaw(self, victim: str) -> None:
        """Until the silence has been noticed, or what only the frozen one can go on with has waited long enough."""
        if victim in ROUTERS or victim == "redis":
            await self._hold(FROZEN_S)
        else:
            await self._wait_noticed(victim)
            await self._hold(max(0.0, FROZEN_S - (time.monotonic() - self._struck_at)))
        self._cluster.send(victim, SIGCONT)

    async def _hold(self, seconds: float) -> None:
        """Waits; a shorter time when all requests have ended."""
        await asyncio.wait([task for _, _, task in self._tasks], timeout=seconds)

    async def _wait_noticed(self, victim: str) -> None:
        async def is_noticed() -> bool:
            status = await self._cluster.status("router-0")
            if victim == "kv_index":
                return not status.index_synchronized
            return not any(worker.worker.worker_id == victim and worker.state == "up" for worker in status.workers)

        try:
            self._outcome.noticed_s = await wait_until(is_noticed, NOTICE_S)
        except AssertionError:
            self._outcome.notes.append(f"{victim} was frozen for {NOTICE_S} s and nobody noticed")


def _imbalance(name: str, load: common_pb2.WorkerLoad) -> list[str]:
    words = []
    if load.num_running or load.num_waiting or load.blocks_owned or load.blocks_quarantined:
        words.append(
            f"{name} has {load.num_running} running, {load.num_waiting} waiting, {load.blocks_owned} blocks owned, "
            f"{load.blocks_quarantined} quarantined"
        )
    if load.blocks_free + load.blocks_cached + load.blocks_owned + load.blocks_quarantined != load.blocks_total:
        words.append(f"{name} has {load.blocks_total} blocks that do not add up")
    return words


def table(outcomes: Mapping[Cell, Outcome]) -> str:
    """Markdown, a row for each cell."""

    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    rows = ["| service | fault | step | wrong | lost | ended | leaked | noticed s | freed s | recovered s |", "| --- " * 10 + "|"]
    for cell, outcome in outcomes.items():
        step = f"block {cell.block}" if cell.block else cell.step.value
        numbers = [str(number) for number in (outcome.wrong, outcome.lost, outcome.ended, outcome.leaked)]
        times = [seconds(value) for value in (outcome.noticed_s, outcome.freed_s, outcome.recovered_s)]
        rows.append("| " + " | ".join([cell.service, cell.fault, step, *numbers, *times]) + " |")
        rows += [f"    {note}" for note in outcome.notes]
    return "\n".join(rows) + "\n"
