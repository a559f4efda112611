"""What the router knows of the workers: who is there, what each has to do, what has been sent to whom and has not come back.

A decision counts the moment it is made, or a burst would run to one worker. What the policy reads is written into the columns of
worker_table; a worker that must not be chosen has infinite cost there, whatever the reason. Knows nothing of requests' tokens, of the
network or of clocks: time is passed in.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from services.router.cost_model import CostModel
from services.router.policy_loops import PREFILL_FACTOR, REPORTED_S, STEP_FACTOR
from services.router.route import Route
from services.router.tracked_worker import REFLECTED_AFTER_S, SILENT_S, LoadReport, TrackedWorker
from services.router.tracked_worker import InFlight as InFlight
from services.router.tracked_worker import Role as Role
from services.router.worker_table import FleetView, WorkerTable

REFRESH_S, DRIFT_S = 0.1, 0.5  # how often silence and recovery, and the drift of slownesses, are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOutcome:
    """How a prompt was computed, as the worker that did it measured.

    worker_id         of whoever computed it; the decode worker's own when it did so itself
    decode_queue_s    until the decode worker had a place and blocks
    queue_s           until the one who computed it began
    tail_s            from the first token to the last block landed; within transfer_s
    failed            prefill workers that were tried before
    """

    worker_id: str
    queue_s: float
    prefill_s: float
    new_tokens: int
    cached_tokens: int
    decode_queue_s: float = 0.0
    transfer_s: float = 0.0
    tail_s: float = 0.0
    kv_blocks: int = 0
    failed: Collection[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker as the router sees it, for people."""

    worker_id: str
    role: Role
    epoch: int
    can_be_chosen: bool
    why_not: str  # empty when it can be chosen
    report_age_s: float
    num_requests: int  # running and waiting, reported and sent since
    own_prefills: int
    own_requests: int
    prefill_slowness: float
    step_slowness: float


class Fleet:
    """Workers of one model and one KV layout. Others may join: they are seen, and never chosen."""

    def __init__(self, *, layout_fingerprint: bytes, block_size: int, model: CostModel) -> None:
        self.model = model
        self._layout_fingerprint = layout_fingerprint
        self._block_size = block_size
        self._tables = {role: WorkerTable(model) for role in Role}
        self._workers: dict[str, TrackedWorker] = {}
        self._slots: list[str | None] | None = None  # of the prefix index, as last seen; None: look again
        self._suspects: dict[TrackedWorker, None] = {}
        self._refreshed_s = self._drifted_s = -math.inf
        self.num_in_flight = 0
        self._view = FleetView(
            now_s=-math.inf,
            block_size=block_size,
            model=model,
            prefill=self._tables[Role.PREFILL],
            decode=self._tables[Role.DECODE],
            row_by_slot=np.zeros(0, dtype=np.int64),
        )

    # Workers

    def join(self, worker_id: str, *, role: Role, epoch: int, layout_fingerprint: bytes) -> None:
        """A worker was reached; it can be chosen from its first report on. With a newer epoch it has lost all that the old one had."""
        known = self._workers.get(worker_id)
        if known is not None:
            if known.epoch >= epoch:
                return
            self.leave(worker_id)
        table = self._tables[role]
        if not table.has_room:
            table.grow()
        self._workers[worker_id] = TrackedWorker(
            worker_id=worker_id,
            role=role,
            epoch=epoch,
            compatible=layout_fingerprint == self._layout_fingerprint,
            model=self.model,
            table=table,
            row=table.take_row(worker_id),
        )
        self._slots = None

    def leave(self, worker_id: str) -> None:
        """A worker is gone, or cannot be reached any more."""
        worker = self._workers.pop(worker_id, None)
        if worker is not None and worker.row is not None:
            worker.table.give_row(worker.row)
            worker.row = None

    def report(self, worker_id: str, load: LoadReport, now_s: float) -> None:
        """Takes what a worker says about itself; unknown workers are ignored."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.take_report(load, now_s)

    def workers(self, now_s: float) -> list[WorkerStatus]:
        """Everybody, for people."""
        statuses = []
        for worker in self._workers.values():
            assert worker.row is not None
            columns, why_not = worker.table.columns, worker.why_not(now_s)
            statuses.append(
                WorkerStatus(
                    worker_id=worker.worker_id,
                    role=worker.role,
                    epoch=worker.epoch,
                    can_be_chosen=not why_not,
                    why_not=why_not,
                    report_age_s=now_s - worker.reported_s,
                    num_requests=worker.num_requests,
                    own_prefills=len(worker.prompts),
                    own_requests=len(worker.requests),
                    prefill_slowness=columns.item(PREFILL_FACTOR, worker.row),
                    step_slowness=columns.item(STEP_FACTOR, worker.row),
                )
            )
        return statuses

    def view(self, now_s: float, index_slots: Sequence[str | None] = ()) -> FleetView:
        """What the policy chooses from. `index_slots` are PrefixIndex.worker_ids."""
        # Comparing a thousand pointers takes a microsecond, and nobody has to remember to tell.
        slots = index_slots if isinstance(index_slots, list) else list(index_slots)
        if self._slots != slots:
            self._bind_slots(slots)
        if now_s - self._refreshed_s >= REFRESH_S:
            self._refresh(now_s)
        self._view.now_s = now_s
        return self._view

    # Requests

    def dispatched(self, route: Route, now_s: float) -> InFlight:
        """Counts a decision. Hand the result back to finished() or failed() exactly when the request's way through this route has ended."""
        decode = self._workers.get(route.decode_worker_id)
        prefill = decode if route.is_local else self._workers.get(route.prefill_worker_ids[0])
        reflected_s = now_s + REFLECTED_AFTER_S
        item = InFlight(route, decode, prefill, now_s, reflected_s, reflected_s + route.decode_wait_s)
        self.num_in_flight += 1
        if prefill is not None:
            prefill.send_prompt(item, now_s)
            if prefill is not decode:
                prefill.publish(now_s)
        if decode is not None:
            decode.send_request(item)
            decode.publish(now_s)
        self.model.note_prompt(route.new_tokens, self.model.prefill.seconds(route.new_tokens, route.prompt_tokens - route.new_tokens))
        return item

    def prefill_done(self, item: InFlight, outcome: PrefillOutcome, now_s: float) -> None:
        """The first token came, and this is how."""
        planned = item.prefill
        self.first_token(item, now_s)
        # The decode worker may have found the prompt in its own cache; that another prefill worker did it says that the first one failed.
        if planned is not None and outcome.worker_id not in (planned.worker_id, item.route.decode_worker_id, *outcome.failed):
            self._blame([planned.worker_id], now_s)
        self._blame(outcome.failed, now_s)
        worker, prefill_s = self._workers.get(outcome.worker_id), outcome.prefill_s
        if worker is not None and worker.row is not None:
            worker.failures = 0
            # The step that others made meanwhile is none of the prompt's; half of what was measured is left, were that estimate wrong.
            prefill_s = max(0.5 * prefill_s, prefill_s - worker.ridden_step_s())
            worker.table.costs.observe_prefill(
                worker.row,
                new_tokens=outcome.new_tokens,
                cached_tokens=outcome.cached_tokens,
                seconds=prefill_s,
                now_s=now_s,
                beside_s=worker.beside_s(item) if worker is planned else 0.0,
            )
        decode = item.decode
        if decode is not None and decode.row is not None and outcome.kv_blocks:
            decode.table.costs.observe_transfer(
                decode.row, num_blocks=outcome.kv_blocks, seconds=outcome.transfer_s, tail_s=outcome.tail_s, now_s=now_s
            )
        known_s = outcome.decode_queue_s + outcome.queue_s + prefill_s + outcome.tail_s
        self.model.note_overhead(now_s - item.dispatched_s - known_s, is_local=outcome.worker_id == item.route.decode_worker_id)

    def first_token(self, item: InFlight, now_s: float) -> None:
        """The first token came: whoever had the prompt is rid of it, and the answer has so many steps to go as answers usually have."""
        if item.decode is not None:
            item.decode.request_decodes(item)
        worker, item.prefill = item.prefill, None
        if worker is not None:
            worker.prompt_computed(item, now_s)
            worker.publish(now_s)

    def finished(self, item: InFlight, now_s: float, *, output_tokens: int) -> None:
        """The request has ended well; `output_tokens` over all its choices."""
        if item.decode is not None:
            item.decode.failures = 0
        if self._end(item, now_s):
            self.model.note_output(output_tokens // item.route.num_choices)

    def failed(self, item: InFlight, now_s: float, *, blamed: Collection[str] = ()) -> None:
        """The request has ended otherwise: cancelled (nobody is to blame), or by an error of the workers named."""
        self._end(item, now_s)
        self._blame(blamed, now_s)

    def _end(self, item: InFlight, now_s: float) -> bool:
        """Takes a request out of all counts, once. False: it was out."""
        if item.ended:
            return False
        item.ended = True
        self.num_in_flight -= 1
        prefill, item.prefill = item.prefill, None
        if prefill is not None:
            prefill.prompt_dropped(item, now_s)
            prefill.publish(now_s)
        decode = item.decode
        if decode is not None:
            decode.request_ended(item)
            decode.publish(now_s)
        return True

    def _blame(self, worker_ids: Collection[str], now_s: float) -> None:
        for worker_id in worker_ids:
            worker = self._workers.get(worker_id)
            if worker is not None:
                worker.suspect(now_s)
                self._suspects[worker] = None

    def _refresh(self, now_s: float) -> None:
        """What time alone changes."""
        self._refreshed_s = now_s
        for worker in self._suspects:
            worker.publish(now_s)
        self._suspects = {worker: None for worker in self._suspects if worker.suspected_until_s > now_s}
        drifts = now_s - self._drifted_s >= DRIFT_S
        if drifts:
            self._drifted_s = now_s
        for table in self._tables.values():
            if drifts:
                table.costs.drift(now_s)
            for row in (table.columns[REPORTED_S] < now_s - SILENT_S).nonzero()[0].tolist():
                self._workers[table.worker_ids[row]].publish(now_s)

    def _bind_slots(self, slots: list[str | None]) -> None:
        self._slots = list(slots)
        first_row = {Role.PREFILL: 0, Role.DECODE: len(self._tables[Role.PREFILL].worker_ids)}
        nobody = sum(len(table.worker_ids) for table in self._tables.values())
        row_by_slot = self._view.row_by_slot = np.full(len(slots), nobody, dtype=np.int64)
        for slot, worker_id in enumerate(slots):
            worker = self._workers.get(worker_id) if worker_id is not None else None
            if worker is not None and worker.row is not None:
                row_by_slot[slot] = first_row[worker.role] + worker.row
