"""Faults on the run's own clock: processes of this machine are killed, frozen, drained or restarted in turn at planned moments.

    KIND:WHO@AT[/EVERY]      kill:prefill,decode@20/20   freeze=3:decode-0@30   drain:decode@60   rolling:prefill,decode@10

    kill       SIGKILL              freeze=S   SIGSTOP, SIGCONT after S seconds
    drain      SIGTERM              rolling    each worker of WHO drained, the next one when it is back

WHO are roles or worker ids; with several, or with a role of several workers, they are struck in turn. Whoever supervises the processes
(`baton up` does) starts them again. What a fault cost is seen by costs().
"""

import asyncio
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from loadtest.files import BadInput, unwrapped
from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.result import FaultMark
from loadtest.run.watch import Watch

KINDS = ("kill", "freeze", "drain", "rolling")
DEFAULT_FREEZE_S = 3.0
BACK_TIMEOUT_S = 60.0
RECOVERED_AT, WINDOW_S = 0.95, 2.0
_FORM = re.compile(r"(?P<kind>\w+)(?:=(?P<seconds>[\d.]+))?:(?P<who>[\w.,-]+)@(?P<at>[\d.]+)(?:/(?P<every>[\d.]+))?")
_LOCAL = ("127.", "localhost", "0.0.0.0", "[::1]", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One order: whom to strike, how, when, how often."""

    kind: str
    who: tuple[str, ...]
    at_s: float
    every_s: float | None = None
    seconds: float = DEFAULT_FREEZE_S

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Raises BadInput unless it has the form above."""
        match = _FORM.fullmatch(text)
        if match is None or match["kind"] not in KINDS:
            raise BadInput(f"--fault: {text!r} is not KIND:WHO@AT[/EVERY] with a kind of {', '.join(KINDS)}")
        try:
            seconds = float(match["seconds"]) if match["seconds"] else DEFAULT_FREEZE_S
            at_s, every_s = float(match["at"]), float(match["every"]) if match["every"] else None
        except ValueError:
            raise BadInput(f"--fault: {text!r} has a time that is no number") from None
        if every_s is not None and every_s <= 0.0:
            raise BadInput(f"--fault: {text!r}: it cannot come again every 0 s")
        return cls(kind=match["kind"], who=tuple(match["who"].split(",")), at_s=at_s, every_s=every_s, seconds=seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A fault that has happened; `at_s` from the start of the run, `struck_s` on time.monotonic()'s clock."""

    at_s: float
    struck_s: float
    kind: str
    worker_id: str


class Striker:
    """Carries out faults until it is cancelled or the run's arrivals are over; `strikes` grows meanwhile."""

    def __init__(self, faults: Sequence[Fault], watch: Watch, *, start_s: float, end_s: float, strikes: list[Strike]) -> None:
        self._faults, self._watch = faults, watch
        self._start_s, self._end_s = start_s, end_s
        self._strikes = strikes

    async def run(self) -> None:
        """Returns when the last one has struck. Raises BadInput for whom it cannot reach."""
        known = self._watch.names()
        for who in [who for fault in self._faults for who in fault.who if who not in known]:
            raise BadInput(f"--fault: {who!r} is neither a worker nor a role; there are {', '.join(sorted(known))}")
        with unwrapped():
            async with asyncio.TaskGroup() as tasks:
                for fault in self._faults:
                    tasks.create_task(self._carry_out(fault))

    async def _carry_out(self, fault: Fault) -> None:
        at_s, turn = fault.at_s, 0
        while at_s < self._end_s:
            await asyncio.sleep(max(0.0, self._start_s + at_s - time.monotonic()))
            if fault.kind == "rolling":
                for worker_id in [worker_id for who in fault.who for worker_id in self._watch.worker_ids(who)]:
                    await self._strike(fault, worker_id)
                    await self._wait_back(worker_id)
            else:
                # The roles in turn, and the workers of a role in turn; who is not up now is passed over.
                who = fault.who[turn % len(fault.who)]
                candidates = self._watch.worker_ids(who)
                if candidates:
                    await self._strike(fault, candidates[turn // len(fault.who) % len(candidates)])
            turn += 1
            if fault.every_s is None:
                return
            at_s += fault.every_s

    async def _strike(self, fault: Fault, worker_id: str) -> None:
        pid = await asyncio.to_thread(pid_of, worker_id, self._watch.address_of(worker_id) or "")
        now_s = time.monotonic()
        self._strikes.append(Strike(at_s=now_s - self._start_s, struck_s=now_s, kind=fault.kind, worker_id=worker_id))
        if fault.kind == "freeze":
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                os.kill(pid, signal.SIGCONT)
        else:
            os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM)

    async def _wait_back(self, worker_id: str) -> None:
        struck_s = self._strikes[-1].struck_s
        try:
            async with asyncio.timeout(BACK_TIMEOUT_S):
                while not is_back(self._watch, worker_id, struck_s):
                    self._watch.seen.clear()
                    await self._watch.seen.wait()
        except TimeoutError:
            raise BadInput(f"{worker_id} did not come back within {BACK_TIMEOUT_S:g} s: nobody starts it again") from None


def is_back(watch: Watch, worker_id: str, struck_s: float) -> bool:
    """Whether a worker that was drained serves again: another start of it is up."""
    history = watch.histories.get(worker_id, [])
    before = [sighting.epoch for sighting in history if sighting.at_s < struck_s]
    return bool(history) and history[-1].state == "up" and (not before or history[-1].epoch != before[-1])


def pid_of(worker_id: str, address: str) -> int:
    """The process that listens at a worker's address. Raises BadInput unless it is one of this machine."""
    host, _, port = address.rpartition(":")
    if not host.startswith(_LOCAL):
        raise BadInput(f"--fault: {worker_id} at {address or 'an unknown address'} is no process of this machine")
    for process in psutil.process_iter():
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == int(port):
                    return int(process.pid)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    raise BadInput(f"--fault: no process of this user listens at {address} ({worker_id})")


def costs(strikes: Sequence[Strike], watch: Watch, records: Sequence[RequestRecord], objective: Objective) -> tuple[FaultMark, ...]:
    """When each was noticed, and when requests fared as before again."""
    return tuple(
        FaultMark(
            at_s=strike.at_s,
            kind=strike.kind,
            worker_id=strike.worker_id,
            detected_s=watch.unnoticed_since(strike.worker_id, strike.struck_s),
            recovered_s=recovered_s(records, objective, strike.at_s),
        )
        for strike in strikes
    )


def recovered_s(records: Sequence[RequestRecord], objective: Objective, fault_s: float) -> float | None:
    """Seconds from a fault until the requests of some WINDOW_S were good as often (95 %) as all before the fault; None: never again."""
    moments = sorted((record.at_s, record.is_good(objective)) for record in records)
    before = [good for at_s, good in moments if at_s < fault_s]
    share = sum(before) / len(before) if before else 1.0
    after = [(at_s, good) for at_s, good in moments if at_s >= fault_s]
    for begin, (at_s, _) in enumerate(after):
        window = [good for moment_s, good in after[begin:] if moment_s < at_s + WINDOW_S]
        if after[begin][1] and sum(window) >= RECOVERED_AT * share * len(window):
            return 0.0 if begin == 0 else at_s - fault_s
    return None


def wrong_answers(records: Sequence[RequestRecord], reference: Sequence[RequestRecord]) -> list[int]:
    """Requests that completed in both runs with different answers."""
    right = {record.index: record.answer_digest for record in reference if record.outcome is Outcome.COMPLETED}
    return [r.index for r in records if r.outcome is Outcome.COMPLETED and r.index in right and right[r.index] != r.answer_digest]


def duplicated(records: Sequence[RequestRecord]) -> list[int]:
    """Requests that got more tokens than they asked for."""
    return [record.index for record in records if record.output_tokens > record.planned_tokens]
