"""`micro routing`: from a request's tokens to its workers: hash the prompt, match prefixes, choose, count the decision.

A thousand workers hold two million (worker, block) entries: system prompts that many workers have, sessions and documents that few have.
Every prompt is asked for once, so that neither its hashes nor their entries are in the processor's caches; between the timed decisions the
fleet reports and requests end, as they would. Everything runs in this process, on the router's own code, with the garbage collector on.
The reference is the obvious way to do it: every worker's set of hashes is asked for one block after the other.
"""

import gc
import itertools
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.micro.figure import Figure
from services.core.prefix_hash import HASH_BYTES, TOKEN_BYTES, chain_hashes, prefix_key
from services.core.prefix_index import PrefixIndex
from services.router.cost_model import CostModel
from services.router.fleet import Fleet, InFlight, PrefillOutcome, Role
from services.router.policy import choose
from services.router.route import RouteRequest

NUM_WORKERS = 1000  # half of them prefill
NUM_ENTRIES = 2_000_000
BLOCK_SIZE = 64
BLOCK_TOKEN_BYTES = BLOCK_SIZE * TOKEN_BYTES
KEY = prefix_key(model_fingerprint=b"loadtest")
# tokens → prompts of a run
PROMPTS = {2_000: 500, 8_000: 500, 100_000: 50}
NUM_SYSTEM_PROMPTS = 50
IN_FLIGHT = 1000
PLAIN_EVERY = 10
LAYOUT = b"one"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """A report of a busy worker."""

    num_running: int
    num_waiting: int
    uncomputed_prompt_tokens: int
    blocks_free: int
    blocks_total: int = 8192
    blocks_cached: int = 2000
    engine_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    step_s: float = 0.0
    draining: bool = False
    max_num_seqs: int = 256


@dataclass(slots=True, kw_only=True)
class _Timings:
    """Seconds of each decision of one length of prompts."""

    hashing: list[float]
    deciding: list[float]
    counting: list[float]
    plain: list[float]  # the reference's, of some of them


def measure(*, runs: int) -> tuple[list[Figure], dict[str, object]]:
    """All figures of routing, and the conditions they hold under."""
    bench = _Bench(runs)
    # As the router does once it has its first snapshot: what is there for good is not looked through again.
    gc.collect()
    gc.freeze()
    timings = {num_tokens: [bench.run(num_tokens, run) for run in range(runs)] for num_tokens in PROMPTS}
    gc.unfreeze()
    conditions: dict[str, object] = {
        "workers": NUM_WORKERS,
        "entries": f"{bench.index.num_entries:,}",
        "tokens per block": BLOCK_SIZE,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "garbage collector": "on, frozen after loading" if gc.isenabled() else "off",
    }
    return _figures(timings, runs), conditions


def _figures(timings: dict[int, list[_Timings]], runs: int) -> list[Figure]:
    def figure(name: str, values: Sequence[float], unit: str, target: float | None, plain: Sequence[float] = ()) -> Figure:
        return Figure(
            name=name,
            value=statistics.median(values),
            unit=unit,
            runs=runs,
            reference=statistics.median(plain) if plain else None,
            reference_name="asking each worker's set" if plain else "",
            target=target,
            at_most=True,
            on_ratio=False,
        )

    hashing = [statistics.median(run.hashing) / (8_000 // BLOCK_SIZE) * 1e6 for run in timings[8_000]]
    figures = [figure("hashing", hashing, "µs per block", 2.5)]
    decision_targets = {8_000: (100.0, 1000.0)}
    whole_targets = {2_000: 150.0, 8_000: 400.0, 100_000: 4000.0}
    for num_tokens, of_runs in timings.items():
        p50_target, p99_target = decision_targets.get(num_tokens, (None, None))
        name = f"{num_tokens:,} tokens"
        deciding = [[seconds * 1e6 for seconds in run.deciding] for run in of_runs]
        plain = [_percentile(run.plain, 50) * 1e6 for run in of_runs]
        whole = [[sum(parts) * 1e6 for parts in zip(run.hashing, run.deciding, run.counting, strict=True)] for run in of_runs]
        figures += [
            figure(f"match and choose: {name}, p50", [_percentile(run, 50) for run in deciding], "µs", p50_target, plain),
            figure(f"match and choose: {name}, p99", [_percentile(run, 99) for run in deciding], "µs", p99_target),
            figure(f"whole decision: {name}, p50", [_percentile(run, 50) for run in whole], "µs", whole_targets[num_tokens]),
            figure(f"whole decision: {name}, p99", [_percentile(run, 99) for run in whole], "µs", None),
        ]
    return figures


class _Bench:
    def __init__(self, runs: int) -> None:
        self._random = random.Random(0)
        self._prefill_ids = [f"prefill-{i}" for i in range(NUM_WORKERS // 2)]
        self._decode_ids = [f"decode-{i}" for i in range(NUM_WORKERS // 2)]
        self._worker_ids = self._prefill_ids + self._decode_ids
        self._reporters = itertools.cycle(self._random.sample(self._worker_ids, NUM_WORKERS))
        self._now_s = 0.0
        self._in_flight: list[InFlight] = []
        self._loads: dict[str, _Load] = {}
        self._prompts: dict[tuple[int, int], list[bytes]] = {}
        self.index = PrefixIndex()
        self._fill_index(runs)
        self._fleet = Fleet(layout_fingerprint=LAYOUT, block_size=BLOCK_SIZE, model=CostModel.learnt(block_bytes=8 << 20))
        for role, worker_ids in ((Role.PREFILL, self._prefill_ids), (Role.DECODE, self._decode_ids)):
            for worker_id in worker_ids:
                self._fleet.join(worker_id, role=role, epoch=1, layout_fingerprint=LAYOUT)
                self._report(worker_id)

    def run(self, num_tokens: int, run: int) -> _Timings:
        """One pass over prompts that have never been asked for."""
        timings = _Timings(hashing=[], deciding=[], counting=[], plain=[])
        for number, prompt in enumerate(self._prompts[num_tokens, run]):
            self._pass_time()
            request = RouteRequest(prompt_tokens=num_tokens, max_output_tokens=512, ttft_limit_s=60.0, spread=number)
            started = time.perf_counter()
            hashes = chain_hashes(KEY, prompt, BLOCK_SIZE)
            hashed = time.perf_counter()
            view = self._fleet.view(self._now_s, self.index.worker_ids)
            route = choose(request, self.index.match(hashes), view)
            decided = time.perf_counter()
            item = self._fleet.dispatched(route, self._now_s)
            counted = time.perf_counter()
            timings.hashing.append(hashed - started)
            timings.deciding.append(decided - hashed)
            timings.counting.append(counted - decided)
            self._in_flight.append(item)
        for prompt in self._prompts[num_tokens, run][::PLAIN_EVERY]:
            hashes = chain_hashes(KEY, prompt, BLOCK_SIZE)
            started = time.perf_counter()
            self._choose_plainly(num_tokens, hashes)
            timings.plain.append(time.perf_counter() - started)
        return timings

    def _choose_plainly(self, num_tokens: int, hashes: Sequence[bytes]) -> tuple[str, str]:
        """The reference: asks every worker's set for one block after the other, and takes the cheapest of each role by tokens alone."""
        chosen = []
        for worker_ids in (self._prefill_ids, self._decode_ids):
            best, least = "", float("inf")
            for worker_id in worker_ids:
                held = self.index.hashes(worker_id)
                num_blocks = next((index for index, block_hash in enumerate(hashes) if block_hash not in held), len(hashes))
                cost = num_tokens - num_blocks * BLOCK_SIZE + self._loads[worker_id].uncomputed_prompt_tokens
                if cost < least:
                    best, least = worker_id, cost
            chosen.append(best)
        return chosen[0], chosen[1]

    def _pass_time(self) -> None:
        """A millisecond of a fleet that serves a thousand requests a second: two of the reports that come from each worker every half
        second, a prompt computed, a request ended.
        """
        self._now_s += 1e-3
        for _ in range(2):
            self._report(next(self._reporters))
        if len(self._in_flight) < IN_FLIGHT:
            return
        newest = self._in_flight[-IN_FLIGHT // 2]
        route = newest.route
        worker_id = route.decode_worker_id if route.is_local else route.prefill_worker_ids[0]
        outcome = PrefillOutcome(
            worker_id=worker_id,
            queue_s=route.queue_s,
            prefill_s=route.compute_s * self._random.uniform(0.8, 1.3),
            new_tokens=route.new_tokens,
            cached_tokens=route.prompt_tokens - route.new_tokens,
            transfer_s=0.01,
            tail_s=0.002,
            kv_blocks=0 if route.is_local else route.prompt_tokens // BLOCK_SIZE,
        )
        self._fleet.prefill_done(newest, outcome, self._now_s)
        oldest = self._in_flight.pop(self._random.randrange(IN_FLIGHT // 2))
        self._fleet.finished(oldest, self._now_s, output_tokens=self._random.randint(1, 500))

    def _report(self, worker_id: str) -> None:
        draw = self._random
        is_prefill = worker_id.startswith("prefill")
        load = _Load(
            num_running=draw.randint(0, 4) if is_prefill else draw.randint(20, 120),
            num_waiting=0,
            uncomputed_prompt_tokens=draw.choice([0, 0, 2000, 8000, 30000]) if is_prefill else 0,
            blocks_free=draw.randint(500, 4000),
        )
        self._loads[worker_id] = load
        self._fleet.report(worker_id, load, self._now_s)

    def _fill_index(self, runs: int) -> None:
        """System prompts on many workers, what follows them on few; a tail of every prompt is new."""
        draw = self._random
        holdings: dict[str, set[bytes]] = {worker_id: set() for worker_id in self._worker_ids}
        systems = [os.urandom(draw.randint(4, 24) * BLOCK_TOKEN_BYTES) for _ in range(NUM_SYSTEM_PROMPTS)]
        for rank, system in enumerate(systems, 1):
            hashes = chain_hashes(KEY, system, BLOCK_SIZE)
            for worker_id in draw.sample(self._worker_ids, max(10, NUM_WORKERS // rank)):
                holdings[worker_id].update(hashes)
        popularity = [1 / rank for rank in range(1, NUM_SYSTEM_PROMPTS + 1)]
        for num_tokens, count in PROMPTS.items():
            for run in range(runs):
                prompts = self._prompts[num_tokens, run] = []
                for _ in range(count):
                    size = num_tokens * TOKEN_BYTES
                    system = draw.choices(systems, popularity)[0]
                    prompt = system[:size] + os.urandom(max(0, size - len(system)))
                    prompts.append(prompt)
                    hashes = chain_hashes(KEY, prompt, BLOCK_SIZE)
                    for worker_id in draw.sample(self._worker_ids, draw.choice([0, 1, 2, 2, 3, 4, 8])):
                        # Each holder stopped somewhere, or its tail was evicted.
                        holdings[worker_id].update(hashes[: draw.randint(len(system) // BLOCK_TOKEN_BYTES, len(hashes))])
        missing = NUM_ENTRIES - sum(map(len, holdings.values()))
        while missing > 0:  # what nobody asks for in this run
            held = [draw.randbytes(HASH_BYTES) for _ in range(draw.randint(16, 512))]
            for worker_id in draw.sample(self._worker_ids, draw.choice([1, 1, 2, 4])):
                missing -= len(held)
                holdings[worker_id].update(held)
        for worker_id, hashes_held in holdings.items():
            self.index.replace(worker_id, epoch=1, sequence_number=0, hashes=hashes_held)


def _percentile(values: Sequence[float], percent: int) -> float:
    """By nearest rank."""
    ordered = sorted(values)
    return ordered[-(-len(ordered) * percent // 100) - 1]
