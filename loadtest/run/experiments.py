"""What is done with a schedule: sent once, sent among faults and once more without, or sent at rate after rate; and the result of it."""

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from loadtest.ceilings import Ceilings, ceilings, shared_tokens
from loadtest.files import BadInput
from loadtest.metrics import wilson_interval
from loadtest.records import Outcome, RequestRecord
from loadtest.result import CapacityFound, Cluster, Exactness, Result, ScheduleFacts, now, this_commit, this_machine, this_version
from loadtest.run.capacity import Probe, search
from loadtest.run.discovery import Server
from loadtest.run.faults import Fault, costs, duplicated, wrong_answers
from loadtest.run.measure import Measured, Settings, measure
from loadtest.schedule import Schedule
from loadtest.stability import backlog
from loadtest.summary import summarize
from loadtest.verdict import Verdict, verdict

Outcomes = tuple[Result, Sequence[RequestRecord]]


@dataclass(frozen=True, slots=True)
class Experiment:
    """A schedule and whom it is sent to."""

    schedule: Schedule
    settings: Settings
    name: str

    async def run(self, path: Path, faults: Sequence[Fault], reference: Outcomes | None) -> Outcomes:
        """Sends the schedule, which it stores at `path`; with faults also without them, unless a reference has been so kind.

        Raises BadInput when the reference is of another schedule or of other prompts.
        """
        if reference is not None:
            of, seed = reference[0].schedule.digest, reference[0].extra.get("prompt_seed")
            if (of, seed) != (self.schedule.digest, self.settings.prompt_seed):
                raise BadInput("--reference: it is of another schedule, or of prompts of another seed")
        self.schedule.save(path)
        measured = await measure(self.schedule, path, self.settings, faults)
        exactness = None
        if faults or reference is not None:
            records = reference[1] if reference is not None else await self._without_faults(path)
            exactness = _exactness(measured, records)
        return self._result(measured, exactness=exactness), measured.records

    async def find_capacity(self, goal: float, folder: Path) -> Outcomes:
        """The result of a run at the highest rate that keeps the goal, with all probes; of the lowest one tried when none does."""
        first_rate = len(self.schedule) / max(1e-9, *(request.at_s for request in self.schedule.requests))
        last: dict[float, tuple[Experiment, Measured]] = {}

        async def probe(rate: float, seed: int) -> Probe:
            # Prompts of its own: it would find those of another probe in the caches.
            settings = replace(self.settings, prompt_seed=random.Random(f"{self.settings.prompt_seed} {rate} {seed}").getrandbits(32))
            experiment = Experiment(self.schedule.with_speedup(rate / first_rate), settings, self.name)
            path = folder / f"{len(last)}.jsonl.gz"
            experiment.schedule.save(path)
            measured = await measure(experiment.schedule, path, settings)
            last[rate] = experiment, measured
            found = _probe(rate, seed, measured, settings)
            self._say(f"{rate:.3g} requests/s: {_words(found)}")
            return found

        capacity, found = await search(probe, first_rate=first_rate, goal=goal)
        experiment, measured = last[capacity.rate or min(last)]
        probes = [{**msgspec.to_builtins(one), "n": one.offered} for one in found]
        return experiment._result(measured, capacity=capacity, probes=probes), measured.records

    async def _without_faults(self, path: Path) -> Sequence[RequestRecord]:
        self._say("the same again without faults, to compare the answers")
        return (await measure(self.schedule, path, self.settings)).records

    def _say(self, words: str) -> None:
        if self.settings.console is not None:
            self.settings.console.print(words, highlight=False, markup=False)

    def _result(
        self, measured: Measured, *, exactness: Exactness | None = None, capacity: CapacityFound | None = None, **extra: Any
    ) -> Result:
        settings, schedule, records = self.settings, self.schedule, measured.records
        cluster = _cluster(settings.server, measured)
        problems = exactness.problems() if exactness is not None else ()
        found = verdict(records, settings.objective, max_cached_tokens=_possible_hits(schedule, records))
        summary = summarize(
            records,
            objective=settings.objective,
            duration_s=measured.duration_s,
            num_workers=(cluster.prefill_workers or 0) + (cluster.decode_workers or 0) or None,
            kv_bytes_expected=_expected_kv_bytes(records, settings.server),
        )
        return Result(
            kind="run",
            name=self.name,
            created=now(),
            command=tuple(sys.argv),
            baton=this_version(),
            commit=this_commit(),
            machine=this_machine(),
            schedule=ScheduleFacts.of(schedule, duration_s=measured.duration_s),
            cluster=cluster,
            objective=settings.objective,
            verdict=Verdict(valid=found.valid and not problems, problems=(*found.problems, *problems)),
            summary=summary,
            ceilings=_ceilings(schedule, cluster),
            faults=() if measured.watch is None else costs(measured.strikes, measured.watch, records, settings.objective),
            exactness=exactness,
            capacity=capacity,
            extra={"prompt_seed": settings.prompt_seed, "senders": settings.num_senders, **extra},
        )


def _cluster(server: Server, measured: Measured) -> Cluster:
    """As far as the target says."""
    latest = None if measured.watch is None else measured.watch.latest
    if latest is None:
        return Cluster(target=server.target.url, model=server.target.model)
    roles = [worker.role for worker in latest.workers]
    return Cluster(
        target=server.target.url,
        model=server.target.model,
        prefill_workers=roles.count("prefill"),
        decode_workers=roles.count("decode"),
        blocks_per_worker=min((worker.load.blocks_total for worker in latest.workers), default=None),
        block_size=server.block_size,
        block_bytes=server.block_bytes,
    )


def _ceilings(schedule: Schedule, cluster: Cluster) -> Ceilings | None:
    """Of the pools that keep prompts: prefill's, or decode's when it computes them itself. None for a workload without content."""
    num_pools = cluster.prefill_workers or cluster.decode_workers
    if not num_pools or not cluster.blocks_per_worker or not cluster.block_size or any(request.text for request in schedule.requests):
        return None
    tokens = cluster.blocks_per_worker * cluster.block_size
    return ceilings(schedule, num_pools=num_pools, blocks_per_pool=max(1, tokens // schedule.block_size))


def _possible_hits(schedule: Schedule, records: Sequence[RequestRecord]) -> dict[int, int]:
    """Tokens of each prompt that other prompts share. One that was begun again may find its own."""
    if any(request.text for request in schedule.requests):
        return {}
    shared = shared_tokens(schedule)
    return {record.index: shared[record.index] for record in records if record.attempts <= 1}


def _expected_kv_bytes(records: Sequence[RequestRecord], server: Server) -> int | None:
    """What must have moved: the blocks of each prompt that was computed elsewhere, without those that decode had."""
    if server.block_size is None or server.block_bytes is None:
        return None
    num_blocks = 0
    for record in records:
        if record.outcome is Outcome.COMPLETED and record.prefill_worker_id not in ("", record.decode_worker_id):
            num_blocks += math.ceil(record.input_tokens / server.block_size) - record.decode_cached_tokens // server.block_size
    return num_blocks * server.block_bytes


def _exactness(measured: Measured, reference: Sequence[RequestRecord]) -> Exactness:
    whole = {record.index for record in reference if record.outcome is Outcome.COMPLETED}
    return Exactness(
        lost=sum(record.outcome is Outcome.FAILED for record in measured.records),
        wrong=len(wrong_answers(measured.records, reference)),
        duplicated=len(duplicated(measured.records)),
        compared=sum(record.outcome is Outcome.COMPLETED and record.index in whole for record in measured.records),
        leaked_blocks=sum((measured.held or {}).values()),
    )


def _probe(rate: float, seed: int, measured: Measured, settings: Settings) -> Probe:
    good = sum(record.is_good(settings.objective) for record in measured.records)
    low, high = wilson_interval(good, len(measured.records))
    growth = backlog(measured.records, duration_s=measured.duration_s)
    return Probe(
        rate=rate,
        seed=seed,
        offered=len(measured.records),
        attainment=good / len(measured.records),
        low=low,
        high=high,
        is_stable=growth is None or not growth.grows,
        is_valid=verdict(measured.records, settings.objective).valid,
    )


def _words(probe: Probe) -> str:
    words = f"attainment {probe.attainment:.1%} ({probe.low:.1%} to {probe.high:.1%})"
    return words + ("" if probe.is_stable else ", the backlog grows") + ("" if probe.is_valid else ", the senders did not keep up")
