"""Workers in virtual time around the router's own policy, fleet and cost model: what its tests need of a mesh, and no more.

Prefill is first come first served, with a cache that never evicts; decode runs every request at the step time that its batch has when it
starts. Several routers see the same reports and the same index, and each knows its own dispatches only.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.core.prefix_index import PrefixIndex
from services.router.cost_model import CostModel
from services.router.fleet import Fleet, InFlight, PrefillOutcome, Role
from services.router.policy import choose
from services.router.route import Route, RouteRequest
from tests.unit.router.fleets import BLOCK_SIZE, LAYOUT, Load

REPORT_S = 0.25
PREFILL_S, PREFILL_S_PER_TOKEN = 5e-3, 50e-6
STEP_S, STEP_S_PER_REQUEST = 10e-3, 0.2e-3


@dataclass(slots=True, kw_only=True, eq=False)
class Served:
    """One request: what was asked, and what became of it."""

    arrived_s: float
    hashes: Sequence[bytes]
    prompt_tokens: int
    output_tokens: int
    spread: int
    route: Route
    first_token_s: float = 0.0
    cached_tokens: int = 0
    ended_s: float = 0.0

    @property
    def computed_by(self) -> str:
        return self.route.decode_worker_id if self.route.is_local else self.route.prefill_worker_ids[0]

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrived_s


@dataclass(slots=True, kw_only=True, eq=False)
class _Worker:
    role: Role
    slowness: float = 1.0
    queue: deque[tuple[Served, Fleet, InFlight]] = field(default_factory=deque)
    is_computing: bool = False
    num_running: int = 0
    sequence_number: int = 0


class TinyMesh:
    def __init__(self, *, prefill: int, decode: int, routers: int = 1) -> None:
        self.now_s = 0.0
        self.index = PrefixIndex()
        self.fleets = [
            Fleet(layout_fingerprint=LAYOUT, block_size=BLOCK_SIZE, model=CostModel.learnt(block_bytes=1 << 20)) for _ in range(routers)
        ]
        self.served: list[Served] = []
        self._workers = {f"prefill-{i}": _Worker(role=Role.PREFILL) for i in range(prefill)}
        self._workers |= {f"decode-{i}": _Worker(role=Role.DECODE) for i in range(decode)}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for worker_id, worker in self._workers.items():
            self.index.replace(worker_id, epoch=1, sequence_number=0, hashes=[])
            for fleet in self.fleets:
                fleet.join(worker_id, role=worker.role, epoch=1, layout_fingerprint=LAYOUT)
        self._report()

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), action))

    def slow_down(self, worker_id: str, slowness: float) -> None:
        self._workers[worker_id].slowness = slowness

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._events)
            action()
        self.now_s = until_s

    def request(self, *, hashes: Sequence[bytes] = (), prompt_tokens: int, output_tokens: int, router: int = 0, spread: int = 0) -> Served:
        """A request arrives now."""
        fleet = self.fleets[router]
        asked = RouteRequest(prompt_tokens=prompt_tokens, max_output_tokens=output_tokens, spread=spread)
        route = choose(asked, self.index.match(hashes), fleet.view(self.now_s, self.index.worker_ids))
        item = fleet.dispatched(route, self.now_s)
        served = Served(
            arrived_s=self.now_s,
            hashes=hashes,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            spread=spread,
            route=route,
        )
        self.served.append(served)
        worker = self._workers[served.computed_by]
        worker.queue.append((served, fleet, item))
        self._compute(served.computed_by, worker)
        return served

    def _compute(self, worker_id: str, worker: _Worker) -> None:
        if worker.is_computing or not worker.queue:
            return
        worker.is_computing = True
        served, fleet, item = worker.queue[0]
        held = next((m.num_blocks for m in self.index.match(served.hashes) if worker_id in self.index.workers_in(m.workers)), 0)
        served.cached_tokens = min(held, (served.prompt_tokens - 1) // BLOCK_SIZE) * BLOCK_SIZE
        prefill_s = worker.slowness * (PREFILL_S + PREFILL_S_PER_TOKEN * (served.prompt_tokens - served.cached_tokens))
        queue_s = self.now_s - served.arrived_s

        def done() -> None:
            worker.queue.popleft()
            worker.is_computing = False
            worker.sequence_number += 1
            self.index.apply(worker_id, epoch=1, sequence_number=worker.sequence_number, stored=list(served.hashes), removed=[])
            outcome = PrefillOutcome(
                worker_id=worker_id,
                queue_s=queue_s,
                prefill_s=prefill_s,
                new_tokens=served.prompt_tokens - served.cached_tokens,
                cached_tokens=served.cached_tokens,
            )
            fleet.prefill_done(item, outcome, self.now_s)
            served.first_token_s = self.now_s
            self._decode(served, fleet, item)
            self._compute(worker_id, worker)

        self.at(self.now_s + prefill_s, done)

    def _decode(self, served: Served, fleet: Fleet, item: InFlight) -> None:
        worker = self._workers[served.route.decode_worker_id]
        worker.num_running += 1
        step_s = worker.slowness * (STEP_S + STEP_S_PER_REQUEST * worker.num_running)

        def ended() -> None:
            worker.num_running -= 1
            served.ended_s = self.now_s
            fleet.finished(item, self.now_s, output_tokens=served.output_tokens)

        self.at(self.now_s + step_s * served.output_tokens, ended)

    def _report(self) -> None:
        for worker_id, worker in self._workers.items():
            load = Load(
                num_running=worker.num_running,
                num_waiting=len(worker.queue) if worker.role is Role.DECODE else 0,
                uncomputed_prompt_tokens=sum(served.prompt_tokens for served, _, _ in worker.queue),
            )
            for fleet in self.fleets:
                fleet.report(worker_id, load, self.now_s)
        self.at(self.now_s + REPORT_S, self._report)
