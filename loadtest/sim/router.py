"""The routers of a simulated mesh. Baton's is the product's own index, fleet, policy, admission and cost model, told what a router is told;
round robin is what all others are compared with.

No clock, no network: time is passed in, and whoever tells has waited as long as a network would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from loadtest.sim.worker import Load, SimWorker
from services.core.prefix_index import PrefixIndex
from services.router.admission import Admission, Place
from services.router.cost_model import CostModel
from services.router.fleet import Fleet, InFlight, PrefillOutcome, Role
from services.router.policy import choose, warm_up
from services.router.route import Route, RouteRequest

LAYOUT = b"simulated"
EPOCH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a router is given of a request."""

    hashes: Sequence[bytes]  # of its full blocks
    tokens: int
    output_tokens: int


class Ticket(Protocol):
    """A decision, to be handed back with what became of it."""

    @property
    def decode_worker_id(self) -> str: ...
    @property
    def prefill_worker_id(self) -> str | None: ...
    @property
    def local_prefill_tokens(self) -> int: ...


class SimRouter(Protocol):
    """Raises Overloaded or QueueFull from decide() when it refuses."""

    def decide(self, prompt: Prompt, now_s: float) -> Ticket: ...
    def first_token(self, ticket: Ticket, outcome: PrefillOutcome, now_s: float) -> None: ...
    def finished(self, ticket: Ticket, now_s: float, output_tokens: int) -> None: ...
    def report(self, worker_id: str, load: Load, now_s: float) -> None: ...
    def blocks_changed(self, worker_id: str, stored: Sequence[bytes], removed: Sequence[bytes]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Turn:
    decode_worker_id: str
    prefill_worker_id: str | None
    local_prefill_tokens: int = 0


class RoundRobin:
    """One worker of each kind after the other."""

    def __init__(self, prefill: Sequence[SimWorker], decode: Sequence[SimWorker]) -> None:
        self._prefill = [worker.worker_id for worker in prefill]
        self._decode = [worker.worker_id for worker in decode]
        self._count = count()

    def decide(self, prompt: Prompt, now_s: float) -> Ticket:
        turn = next(self._count)
        prefill = self._prefill[turn % len(self._prefill)] if self._prefill else None
        return _Turn(self._decode[turn % len(self._decode)], prefill)

    def first_token(self, ticket: Ticket, outcome: PrefillOutcome, now_s: float) -> None:
        pass

    def finished(self, ticket: Ticket, now_s: float, output_tokens: int) -> None:
        pass

    def report(self, worker_id: str, load: Load, now_s: float) -> None:
        pass

    def blocks_changed(self, worker_id: str, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Routed:
    """A decision of the product's policy."""

    route: Route
    item: InFlight
    place: Place
    prompt: Prompt

    @property
    def decode_worker_id(self) -> str:
        return self.route.decode_worker_id

    @property
    def prefill_worker_id(self) -> str | None:
        return self.route.prefill_worker_ids[0] if self.route.prefill_worker_ids else None

    @property
    def local_prefill_tokens(self) -> int:
        return self.route.local_prefill_tokens


class BatonRouter:
    """One router of the product; what generation.py does with a request, less the request itself."""

    def __init__(
        self,
        prefill: Sequence[SimWorker],
        decode: Sequence[SimWorker],
        *,
        model: CostModel,
        block_size: int,
        admission: Admission,
        max_local_tokens: int | None,
    ) -> None:
        warm_up()
        self._index = PrefixIndex()
        self._fleet = Fleet(layout_fingerprint=LAYOUT, block_size=block_size, model=model)
        self._block_size = block_size
        self._admission = admission
        self._max_local_tokens = max_local_tokens
        self._spread = count()
        self._sequence_numbers: dict[str, int] = {}
        for role, workers in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for worker in workers:
                self._fleet.join(worker.worker_id, role=role, epoch=EPOCH, layout_fingerprint=LAYOUT)
                self._index.replace(worker.worker_id, epoch=EPOCH, sequence_number=0, hashes=())
                self._sequence_numbers[worker.worker_id] = 0
                self._fleet.report(worker.worker_id, worker.load(), 0.0)

    def decide(self, prompt: Prompt, now_s: float) -> Ticket:
        place = self._admission.enter()
        try:
            route = choose(
                RouteRequest(
                    prompt_tokens=prompt.tokens,
                    max_output_tokens=prompt.output_tokens,
                    ttft_limit_s=self._admission.ttft_limit_s(None),
                    spread=next(self._spread),
                    max_local_tokens=self._max_local_tokens,
                ),
                self._index.match(prompt.hashes),
                self._fleet.view(now_s, self._index.worker_ids),
            )
            self._admission.check(route)
        except BaseException:
            place.leave()
            raise
        return Routed(route, self._fleet.dispatched(route, now_s), place, prompt)

    def first_token(self, ticket: Ticket, outcome: PrefillOutcome, now_s: float) -> None:
        assert isinstance(ticket, Routed)
        self._fleet.prefill_done(ticket.item, outcome, now_s)
        route = ticket.route
        self._admission.note_first_token(route, now_s - ticket.item.dispatched_s)
        predicted = dict(zip(route.prefill_worker_ids, route.prefill_cached_tokens, strict=True))
        predicted[route.decode_worker_id] = route.decode_cached_tokens
        missing = ticket.prompt.hashes[outcome.cached_tokens // self._block_size : predicted[outcome.worker_id] // self._block_size]
        if missing:
            self._index.disown(outcome.worker_id, missing)

    def finished(self, ticket: Ticket, now_s: float, output_tokens: int) -> None:
        assert isinstance(ticket, Routed)
        self._fleet.finished(ticket.item, now_s, output_tokens=output_tokens)
        ticket.place.leave()

    def report(self, worker_id: str, load: Load, now_s: float) -> None:
        self._fleet.report(worker_id, load, now_s)

    def blocks_changed(self, worker_id: str, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        self._sequence_numbers[worker_id] += 1
        number = self._sequence_numbers[worker_id]
        applied = self._index.apply(worker_id, epoch=EPOCH, sequence_number=number, stored=stored, removed=removed)
        assert applied
