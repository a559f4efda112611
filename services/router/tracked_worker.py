"""One worker as the router knows it: its last report, what this router has sent it since, and what that means for the next request.

A report is old when it arrives, and several routers send to the same worker. So each estimate is the last report, plus what this router
has sent that cannot be in it yet, less what has ended since.

    prompts waiting to be computed   `free_at_s`, the time at which the worker will have computed all it has: a dispatch moves it on, a
                                     report sets it, time itself works it off
    places and blocks on decode      counts, turned into the seconds until there is room and into the step time of the batch

Knows no other worker, and no clock.
"""

import enum
import math
from dataclasses import dataclass, field
from typing import Protocol

from services.router.cost_model import CostModel
from services.router.departures import Departures
from services.router.policy_loops import (
    BLOCKS_AVAILABLE,
    BLOCKS_TOTAL,
    FREE_AT_S,
    NUM_RUNNING,
    PREFILL_FACTOR,
    REPORTED_S,
    S_PER_MISSING_BLOCK,
    STEP_FACTOR,
    TOKEN_COST_S,
    TOKEN_COST_S_PER_BLOCK,
    TPOT_S,
    TPOT_S_PER_BLOCK,
    WAIT_S,
)
from services.router.route import Route
from services.router.worker_table import WorkerTable

STALE_S = 5.0  # without a report for so long: not chosen
SILENT_S = 1.0  # without a report for so long, two heartbeats: what it has is not expected to have got on since
REFLECTED_AFTER_S = 0.05  # until a dispatch has reached its worker and shows in the reports that arrive
FIRST_COOL_DOWN_S, LAST_COOL_DOWN_S = 0.5, 8.0  # a worker that failed counts as busy for so long; doubles with each failure in a row
STEPS_TO_LEARN, STEPS_TO_LEARN_S = 16, 0.5  # a worker's steps are looked at after so many, or so long


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class LoadReport(Protocol):
    """How busy a worker is, as it says itself: baton.v1.WorkerLoad, or a simulated worker's."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def uncomputed_prompt_tokens(self) -> int: ...
    @property
    def blocks_total(self) -> int: ...
    @property
    def blocks_free(self) -> int: ...
    @property
    def blocks_cached(self) -> int: ...
    @property
    def engine_steps(self) -> int: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def decode_tokens(self) -> int: ...
    @property
    def step_s(self) -> float: ...
    @property
    def draining(self) -> bool: ...
    @property
    def max_num_seqs(self) -> int: ...


@dataclass(slots=True, eq=False)
class InFlight:
    """One dispatched route until it has ended; the fleet's own, callers only hand it back."""

    route: Route
    decode: "TrackedWorker | None"
    prefill: "TrackedWorker | None"  # who is expected to compute the prompt; None when it has been
    dispatched_s: float
    in_decode_reports_s: float  # from this time on the reports count it
    in_prefill_reports_s: float
    ended: bool = False
    left_s: float = 0.0  # predicted for what its worker had not computed of it by the last report
    beside_s: float = 0.0  # predicted for the prompts that its worker had when this one came
    sent_before_s: float = 0.0  # its worker's `sent_s` then
    end_step: float | None = None  # of the decode worker, with which it is expected to end; None while its first token has not come


@dataclass(slots=True, eq=False)
class TrackedWorker:
    """`row` is its place in the table of its role; None when it has left, which requests in flight may outlive."""

    worker_id: str
    role: Role
    epoch: int
    compatible: bool
    model: CostModel
    table: WorkerTable
    row: int | None
    reported_s: float = -math.inf  # never
    draining: bool = False
    suspected_until_s: float = -math.inf
    failures: int = 0  # in a row
    sent_s: float = 0.0  # predicted for all prompts that this router has ever sent it
    prompts: dict[InFlight, None] = field(default_factory=dict)  # sent by this router, not computed yet
    requests: dict[InFlight, None] = field(default_factory=dict)  # sent by this router, not ended yet
    _free_at_s: float = -math.inf
    _others_s: float = 0.0  # of the reported backlog, what this router did not send
    _departures: Departures = field(default_factory=Departures)
    _num_own: int = 0  # choices of `requests`; taken to end together
    _pace_s: float = 0.0  # of a step lately, with the prompts that rode along
    # As reported, and what has changed since.
    _num_requests: int = 0
    _max_num_seqs: int = 1
    _blocks_total: int = 0
    _blocks_available: int = 0
    _requests_since: int = 0
    _blocks_since: int = 0
    _engine_steps: int = 0
    _learnt: tuple[float, ...] | None = None  # time, engine_steps, step_s, prefill_tokens, decode_tokens when last learnt from

    @property
    def num_requests(self) -> int:
        """Running and waiting."""
        return max(0, self._num_requests + self._requests_since)

    def can_be_chosen(self, now_s: float) -> bool:
        return self.compatible and not self.draining and now_s - self.reported_s <= STALE_S

    def why_not(self, now_s: float) -> str:
        """For people; empty when it can be chosen."""
        if self.can_be_chosen(now_s):
            return ""
        if not self.compatible:
            return "another model or KV layout"
        if self.draining:
            return "draining"
        if self.reported_s == -math.inf:
            return "no report yet"
        return f"silent for {now_s - self.reported_s:.1f} s"

    def take_report(self, load: LoadReport, now_s: float) -> None:
        self.reported_s = now_s
        self.draining = load.draining
        self._num_requests = load.num_running + load.num_waiting
        self._max_num_seqs = max(1, load.max_num_seqs)
        self._blocks_total = load.blocks_total
        self._blocks_available = load.blocks_free + load.blocks_cached
        self._engine_steps = load.engine_steps
        unseen = [item for item in self.requests if item.in_decode_reports_s > now_s]
        self._requests_since = sum(item.route.num_choices for item in unseen)
        self._blocks_since = -sum(item.route.decode_blocks for item in unseen)
        self._set_backlog(load, now_s)
        if self.role is Role.DECODE:
            self._learn_steps(load, now_s)
        self.publish(now_s)

    def suspect(self, now_s: float) -> None:
        """It has failed a request: for a while others are better."""
        self.suspected_until_s = now_s + min(LAST_COOL_DOWN_S, FIRST_COOL_DOWN_S * 2 ** min(self.failures, 8))
        self.failures += 1
        self.publish(now_s)

    def send_prompt(self, item: InFlight, now_s: float) -> None:
        item.left_s = item.route.compute_s
        item.beside_s = self._others_s + sum(other.route.compute_s for other in self.prompts)
        self.sent_s += item.route.compute_s
        item.sent_before_s = self.sent_s
        self.prompts[item] = None
        self._free_at_s = max(self._free_at_s, now_s) + item.route.compute_s

    def beside_s(self, item: InFlight) -> float:
        """Predicted for the prompts that it may have computed together with this one."""
        return item.beside_s + self.sent_s - item.sent_before_s

    def ridden_step_s(self) -> float:
        """Of a prompt computed here, with whose first chunk others decoded: the seconds that this step of theirs takes."""
        if self.role is not Role.DECODE or self.row is None or self.num_requests < 2:
            return 0.0
        return self.table.columns.item(TPOT_S, self.row)

    def prompt_computed(self, item: InFlight, now_s: float) -> None:
        del self.prompts[item]
        # The rest is still to be computed, as far as known from here.
        others_s = max(0.0, self._others_s - (now_s - self.reported_s))
        self._free_at_s = now_s + others_s + sum(other.left_s for other in self.prompts)

    def prompt_dropped(self, item: InFlight, now_s: float) -> None:
        del self.prompts[item]
        self._free_at_s = max(now_s, self._free_at_s - item.left_s)

    def send_request(self, item: InFlight) -> None:
        self.requests[item] = None
        self._num_own += item.route.num_choices
        self._requests_since += item.route.num_choices
        self._blocks_since -= item.route.decode_blocks

    def request_decodes(self, item: InFlight) -> None:
        """Its first token has come."""
        if item in self.requests and item.end_step is None:
            item.end_step = self._engine_steps + item.route.predicted_output_tokens
            self._departures.add(item.end_step, item.route.num_choices)

    def request_ended(self, item: InFlight) -> None:
        del self.requests[item]
        if item.end_step is not None:
            self._departures.remove(item.end_step, item.route.num_choices)
        self._num_own -= item.route.num_choices
        self._requests_since -= item.route.num_choices
        self._blocks_since += item.route.decode_blocks

    def publish(self, now_s: float) -> None:
        """Writes its row of the table."""
        table, row = self.table, self.row
        if row is None:
            return
        columns = table.columns
        columns[REPORTED_S, row] = self.reported_s
        if not self.can_be_chosen(now_s):
            columns[FREE_AT_S, row] = columns[WAIT_S, row] = math.inf
            return
        # Silence and failures count as work: other workers are better, but if there is none this one is tried.
        penalty_s = max(0.0, now_s - self.reported_s - SILENT_S) + max(0.0, self.suspected_until_s - now_s)
        columns[FREE_AT_S, row] = max(self._free_at_s, now_s) + penalty_s if penalty_s else self._free_at_s
        columns[BLOCKS_TOTAL, row] = self._blocks_total
        if self.role is Role.DECODE:
            self._publish_decode(row, penalty_s)

    def _publish_decode(self, row: int, penalty_s: float) -> None:
        columns, step_s = self.table.columns, self.model.step.seconds
        num_requests = self.num_requests
        running = min(num_requests, self._max_num_seqs)
        total = max(1, self._blocks_total)
        available = min(total, max(0, self._blocks_available + self._blocks_since))
        used = total - available
        slowness = columns.item(STEP_FACTOR, row)
        with_it = min(running + 1, self._max_num_seqs)
        tpot_s = slowness * step_s(with_it, used, total)
        few = 1.0 + 0.01 * total
        tpot_s_per_block = max(0.0, slowness * step_s(with_it, used + few, total) - tpot_s) / few
        # All requests that run now will have ended after about this long: blocks come back at that rate.
        pace_s = max(tpot_s, self._pace_s)
        residence_s = self.model.mean_output_tokens * pace_s
        missing_places = max(0, num_requests + 1 - self._max_num_seqs)
        columns[WAIT_S, row] = pace_s * self._steps_until(missing_places) + penalty_s
        columns[NUM_RUNNING, row] = running
        columns[BLOCKS_AVAILABLE, row] = available
        columns[S_PER_MISSING_BLOCK, row] = residence_s / max(1, used)
        columns[TPOT_S, row] = tpot_s
        columns[TPOT_S_PER_BLOCK, row] = tpot_s_per_block
        # A request's share in the step of the others is the average one, not the slope: slopes of fitted curves are not to be trusted.
        columns[TOKEN_COST_S, row] = 2.0 * tpot_s - slowness * step_s(0, 0, total)
        columns[TOKEN_COST_S_PER_BLOCK, row] = 2.0 * tpot_s_per_block

    def _steps_until(self, places: int) -> float:
        """From its last report on, until so many places have come free."""
        if not places:
            return 0.0
        num_queued = places - 1
        return self._departures.steps_until(
            places,
            step=self._engine_steps,
            running=self._max_num_seqs,
            beginning=max(0, self._num_own - len(self._departures) - num_queued),
            lifetime=max(1.0, self.model.mean_output_tokens),
        )

    def _set_backlog(self, load: LoadReport, now_s: float) -> None:
        """When the worker will have computed its prompts, by its own report.

        Workers compute in the order of arrival: of the tokens reported those of this router's own requests, the latest first, cost what was
        predicted for them, the rest what tokens cost lately.
        """
        seen = [item for item in self.prompts if item.in_prefill_reports_s <= now_s]
        left_tokens = load.uncomputed_prompt_tokens
        if not left_tokens and not self.prompts:  # most workers, most of the time
            self._others_s, self._free_at_s = 0.0, now_s
            return
        # A worker may not know yet what it will find in its cache, and have more than is thought here: up to the length of our prompts the
        # tokens may be ours.
        others = max(0, left_tokens - sum(item.route.prompt_tokens for item in self.prompts))
        for index, item in enumerate(reversed(seen)):
            # Of one that waits the worker does not know yet what it will find in its cache.
            tokens = max(1, item.route.prompt_tokens if index < load.num_waiting else item.route.new_tokens)
            item.left_s = item.route.compute_s * min(1.0, left_tokens / tokens)
            left_tokens = max(0, left_tokens - tokens)
        assert self.row is not None
        self._others_s = others * self.model.token_s * self.table.columns.item(PREFILL_FACTOR, self.row)
        self._free_at_s = now_s + self._others_s + sum(item.left_s for item in self.prompts)

    def _learn_steps(self, load: LoadReport, now_s: float) -> None:
        before, now = self._learnt, (now_s, load.engine_steps, load.step_s, load.prefill_tokens, load.decode_tokens)
        if before is None or load.engine_steps < before[1]:
            self._learnt = now
            return
        elapsed_s, steps, step_s, prefill_tokens, decode_tokens = (b - a for a, b in zip(before, now, strict=True))
        if steps < STEPS_TO_LEARN and not (steps and elapsed_s >= STEPS_TO_LEARN_S):
            return
        self._learnt = now
        assert self.row is not None
        if 0.0 <= step_s < math.inf:
            self._pace_s += min(0.5, steps / STEPS_TO_LEARN) * (step_s / steps - self._pace_s)
        prefill_s = prefill_tokens * self.model.token_s * self.table.columns.item(PREFILL_FACTOR, self.row)
        if prefill_s > 0.5 * step_s:
            return  # what is left would be mostly the error of that estimate
        self.table.costs.observe_steps(
            self.row,
            running=decode_tokens / steps,
            used_blocks=self._blocks_total - self._blocks_available,
            total_blocks=self._blocks_total,
            seconds=(step_s - prefill_s) / steps,
            now_s=now_s,
        )
