"""Two engine cores, prompts computed on one and outputs on the other, with the test as what carries blocks and messages between them."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from services.core.types import SampledToken, TokenEvent
from services.engine.core import EngineCore
from services.engine.events import Event, PrefillProgress, Reserved
from services.engine.kv_groups import Place
from services.engine.sequence import EngineRequest, Purpose
from tests.exactness.workloads import BLOCK_SIZE, Output, Outputs, check_balanced, take

# Steps until the blocks of a prefill are let go after the last was copied, and until a peer that was given up stops writing.
HOLD_STEPS, FENCE_STEPS = 3, 20


class Way(enum.Enum):
    """How a request's prompt is computed."""

    LANDED = enum.auto()  # on prefill, all of it
    COMPUTE_HERE = enum.auto()  # on prefill until it is given up, then on decode
    QUARANTINE = enum.auto()  # the same, but prefill goes on writing for a while
    LOCAL = enum.auto()  # on decode, like any request


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`give_up_at`: prompt tokens on decode after which prefill is given up, if that is planned."""

    way: Way = Way.LANDED
    give_up_at: int = 0


class Pair:
    """Steps both cores in turn until every request has ended."""

    def __init__(self, prefill: EngineCore, decode: EngineCore) -> None:
        assert prefill.layout_fingerprint == decode.layout_fingerprint
        self.prefill, self.decode = prefill, decode
        self.num_blocks_moved = self.num_bytes_moved = self.num_gave_up = 0
        self._reserved: dict[str, Reserved] = {}
        self._num_landed: dict[str, int] = {}  # leading blocks that are complete on decode
        self._places: dict[str, list[Place]] = {}
        self._to_release: list[tuple[int, str]] = []
        self._to_lift: list[tuple[int, tuple[int, ...]]] = []
        self._step = 0

    def run(self, requests: Sequence[EngineRequest], plans: Mapping[str, Plan] | None = None) -> Outputs:
        self._requests = {request.request_id: request for request in requests}
        self._plans = plans or {}
        self._outputs: Outputs = {(request.request_id, choice): Output() for request in requests for choice in range(request.sampling.n)}
        for request in requests:
            is_local = self._plan(request.request_id).way is Way.LOCAL
            self.decode.add(request, Purpose.GENERATE if is_local else Purpose.RECEIVE)
        while self.decode.has_work or self.prefill.has_work or self._reserved or self._to_release or self._to_lift:
            if self.decode.has_work:
                self._hear(self.decode.step(), self.decode)
            if self.prefill.has_work:
                self._hear(self.prefill.step(), self.prefill)
            self._act()
            for core in (self.prefill, self.decode):
                stats = core.stats()
                assert stats.blocks_free + stats.blocks_cached + stats.blocks_owned + stats.blocks_quarantined == stats.blocks_total
            self._step += 1
            assert self._step < 10_000, "the requests do not end"
        for core in (self.prefill, self.decode):
            stats = check_balanced(core)
            assert (stats.num_held, stats.num_reserved) == (0, 0)
        return self._outputs

    def _plan(self, request_id: str) -> Plan:
        return self._plans.get(request_id, Plan())

    def _hear(self, events: Sequence[Event], core: EngineCore) -> None:
        for event in events:
            if isinstance(event, Reserved):
                self._reserved[event.request_id] = event
                self._num_landed[event.request_id] = event.num_cached_tokens // BLOCK_SIZE
                self._places[event.request_id] = self.decode.groups.places(self._requests[event.request_id].num_tokens)
                self.prefill.add(self._requests[event.request_id], Purpose.PREFILL)
            elif isinstance(event, PrefillProgress):
                self._move(event)
            else:
                assert isinstance(event, TokenEvent) and core is self.decode
                request = self._requests[event.request_id]
                take(event, self._outputs[event.request_id, event.choice], request.num_tokens)

    def _move(self, progress: PrefillProgress) -> None:
        """Copies the blocks that are complete and not there yet; then all has landed, or the rest is given up."""
        request_id = progress.request_id
        if request_id not in self._reserved:
            return  # given up in the step before
        plan, reserved = self._plan(request_id), self._reserved[request_id]
        is_last = progress.first_tokens is not None
        num_tokens = self._requests[request_id].num_tokens
        num_complete = self.decode.groups.num_blocks(num_tokens) if is_last else progress.num_computed_tokens // BLOCK_SIZE
        gives_up = plan.way is not Way.LANDED
        if gives_up:
            num_complete = min(num_complete, plan.give_up_at // BLOCK_SIZE)
        for place, source, target in zip(self._places[request_id], progress.block_ids, reserved.block_ids, strict=True):
            if self._num_landed[request_id] <= place.block < num_complete:
                self._copy(source, target)
        self._num_landed[request_id] = max(num_complete, self._num_landed[request_id])
        if gives_up and (is_last or progress.num_computed_tokens >= plan.give_up_at):
            self._give_up(request_id, plan)
        elif is_last:
            assert progress.first_tokens is not None
            self._land(request_id, progress.first_tokens)

    def _copy(self, source: int, target: int) -> None:
        block = _block(self.prefill, source)
        _block(self.decode, target).copy_(block)
        self.num_blocks_moved += 1
        self.num_bytes_moved += block.nbytes

    def _land(self, request_id: str, first_tokens: Sequence[SampledToken]) -> None:
        del self._reserved[request_id]
        self.decode.validate_first_tokens(self._requests[request_id], first_tokens)
        self._hear(self.decode.landed(request_id, first_tokens), self.decode)
        self._to_release.append((self._step + HOLD_STEPS, request_id))

    def _give_up(self, request_id: str, plan: Plan) -> None:
        reserved = self._reserved.pop(request_id)
        self.num_gave_up += 1
        self.prefill.abort(request_id)
        if plan.way is Way.COMPUTE_HERE:
            self.decode.compute_here(request_id, self._num_landed[request_id] * BLOCK_SIZE)
            return
        self.decode.quarantine(request_id)
        first_block = reserved.num_cached_tokens // BLOCK_SIZE
        places = zip(self._places[request_id], reserved.block_ids, strict=True)
        open_ids = tuple(block_id for place, block_id in places if place.block >= first_block)
        self._to_lift.append((self._step + FENCE_STEPS, open_ids))

    def _act(self) -> None:
        """Peers that cannot be stopped write nonsense; what is due is released and lifted."""
        for _, block_ids in self._to_lift:
            for block_id in block_ids:
                _block(self.decode, block_id).view(self.decode._runner.layouts[0].dtype).fill_(float("nan"))
        for at, request_id in self._to_release:
            if at <= self._step:
                self.prefill.abort(request_id)
        self._to_release = [(at, request_id) for at, request_id in self._to_release if at > self._step]
        for at, block_ids in self._to_lift:
            if at <= self._step:
                self.decode.lift_quarantine(block_ids)
        self._to_lift = [(at, block_ids) for at, block_ids in self._to_lift if at > self._step]


def _block(core: EngineCore, block_id: int) -> torch.Tensor:
    """The memory of a block that others read and write, by its number among those of all pools."""
    runner = core._runner
    group = max(group for group, first in enumerate(runner.first_ids) if first <= block_id)
    return (runner._outside if runner.is_staged else runner.pools)[group][block_id - runner.first_ids[group]]
