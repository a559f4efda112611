"""Chooses the pair of workers for a request: a pure function of the request, the prefix matches, the fleet's state and the cost model.

    cost(prefill p, decode d) = wait(d) + queue(p) + compute(p) + exposed transfer(d) + calls           predicted TTFT
                              + output tokens × (TPOT on d + what the request adds to that of others)   seconds of decoding, everybody's
                              + compute(p) once more, and a share of the transfer that is hidden        paid by those who come after
    cost(d alone)             = wait(d) + backlog(d) + compute(d) + call                                predicted TTFT
                              + output tokens × (the same)
                              + compute(d) once more + requests that run on d × compute(d)              they stand still meanwhile;
                                short stalls count less, and the whole prompt's computing counts against all of them (Weights.keep)

All terms are seconds that somebody waits, so they may be added; weights say how much those of others count. Everything about p is
independent of d, but for the transfer, which hides behind computing: so the best p is found first, and the best d for that p, or for none,
next. That is one pass over each table. A cached prefix has no term of its own: cached tokens are tokens not computed, and a holder with a
queue loses as soon as computing elsewhere costs less.

The decode worker takes room before it calls prefill, hence wait(d) and queue(p) add up. Knows nothing of tokens, hashes or clocks.
"""

import contextlib
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.core.errors import OutOfBlocks, PeerUnavailable
from services.core.prefix_index import Match
from services.router.cost_model import CostModel
from services.router.policy_loops import (
    BLOCKS_AVAILABLE,
    BLOCKS_TOTAL,
    FREE_AT_S,
    NOBODY,
    NUM_RUNNING,
    PREFILL_FACTOR,
    S_PER_MISSING_BLOCK,
    TPOT_S,
    TPOT_S_PER_BLOCK,
    WAIT_S,
    WIRE_FACTOR,
    choose_rows,
    kept_prefix_s,
    local_prompt_cost,
)
from services.router.route import Route, RouteRequest
from services.router.worker_table import FleetView, WorkerTable

NUM_CANDIDATES = 4  # prefill workers that a decode worker may try
MAX_RUNS = 64  # of matches looked at, longest first: with so many better holders the others do not matter
NO_WORKER_RETRY_S = 1.0  # about as long as a restart takes
MAX_SPREAD = (1 << 62) - 1
NO_ROWS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much seconds of different kinds count beside those of TTFT.

    decode      of each output token, for this request and for those it slows down
    recompute   of computing, as capacity that the next requests will lack: why a cached prefix is worth some queueing
    keep        of computing the whole prompt, less what moving it takes beyond that: so much it may cost more elsewhere than on decode.
                Prefixes are looked for on prefill workers; one that is computed and found again on decode instead goes stale there
    patience_s  a stall of decode of this length counts half, a shorter one less: a reader hardly notices it
    wire        of moving blocks counts at least so much, even where computing hides it: links are shared
    near        costs that differ by no more than this share of what the first token costs, or near_s, are equal: estimates are no
                better, and routers that share nothing would all pick the same worker
    """

    decode: float = 1.0
    recompute: float = 1.5
    keep: float = 2.0
    patience_s: float = 0.3
    wire: float = 0.1
    near: float = 0.002
    near_s: float = 1e-4


BALANCED = Weights()
FIRST_TOKEN_ONLY = Weights(decode=0.0, recompute=0.0, keep=0.0, wire=0.0)


def choose(request: RouteRequest, matches: Iterable[Match], fleet: FleetView, *, weights: Weights = BALANCED) -> Route:
    """The cheapest pair whose predicted TTFT keeps the request's limit; if none does, the one with the earliest first token.

    matches   of PrefixIndex.match, fewest blocks first; slots as given to Fleet.view
    Raises PeerUnavailable when no decode worker can be chosen, OutOfBlocks when all that can are too small for the prompt.
    """
    choice = _Choice(request, matches, fleet)
    route = choice.route(weights)
    if request.ttft_limit_s is not None and route.predicted_ttft_s > request.ttft_limit_s:
        return choice.route(FIRST_TOKEN_ONLY)
    return route


def warm_up() -> None:
    """Has the loop over the workers compiled, or read from disk, before a request would wait for it: seconds on a new machine, once."""
    model = CostModel.learnt(block_bytes=1)
    nobody = FleetView(
        now_s=0.0, block_size=1, model=model, prefill=WorkerTable(model), decode=WorkerTable(model), row_by_slot=NO_ROWS.copy()
    )
    with contextlib.suppress(PeerUnavailable):
        choose(RouteRequest(prompt_tokens=1), [], nobody)


class _Choice:
    """A request before one fleet: what the loop over the workers is given, and what its answer means."""

    def __init__(self, request: RouteRequest, matches: Iterable[Match], fleet: FleetView) -> None:
        self._request, self._fleet = request, fleet
        prefill_s, block_size = fleet.model.prefill.seconds, fleet.block_size
        # Level 0 are workers that hold nothing, level i those of the i-th run. At least one token is computed, even if all are cached.
        runs = deque(matches, MAX_RUNS)
        usable = (request.prompt_tokens - 1) // block_size
        self._cached_blocks = [0, *[min(run.num_blocks, usable) for run in runs]]
        self._typical_s = [prefill_s(request.prompt_tokens - n * block_size, n * block_size) for n in self._cached_blocks]
        self._one_token_s = prefill_s(1, 0)
        mask_bytes = (len(fleet.row_by_slot) + 7) // 8
        self._packed = np.frombuffer(b"".join([run.workers.to_bytes(mask_bytes, "little") for run in runs]), np.uint8)
        self._prompt_blocks = -(-request.prompt_tokens // block_size)
        self._output_tokens = fleet.model.mean_output_tokens
        if request.max_output_tokens is not None:
            self._output_tokens = min(self._output_tokens, float(request.max_output_tokens))
        self._decode_blocks = self._prompt_blocks + request.num_choices * (int(self._output_tokens) // block_size + 1)
        self._excluded = self._joint_rows(request.excluded) if request.excluded else NO_ROWS
        if request.must_be_local:
            self._excluded = np.union1d(self._excluded, np.arange(len(fleet.prefill.worker_ids), dtype=np.int64))

    def _joint_rows(self, worker_ids: Collection[str]) -> npt.NDArray[np.int64]:
        prefill, decode = self._fleet.prefill.worker_ids, self._fleet.decode.worker_ids
        rows = [prefill.index(worker_id) for worker_id in worker_ids if worker_id in prefill]
        rows += [len(prefill) + decode.index(worker_id) for worker_id in worker_ids if worker_id in decode]
        return np.array(rows, dtype=np.int64)

    def route(self, weights: Weights) -> Route:
        request, fleet, model = self._request, self._fleet, self._fleet.model
        candidates = np.empty(NUM_CANDIDATES, dtype=np.int64)
        levels = np.zeros(len(fleet.prefill.worker_ids) + len(fleet.decode.worker_ids) + 1, dtype=np.int64)
        d, local_cost, remote_cost = choose_rows(
            candidates,
            levels,
            fleet.prefill.columns,
            fleet.decode.columns,
            self._packed,
            fleet.row_by_slot,
            np.array((self._typical_s, self._cached_blocks)),
            self._excluded,
            fleet.now_s,
            request.prompt_tokens,
            fleet.block_size,
            self._decode_blocks,
            self._output_tokens * request.num_choices,
            -1 if request.max_local_tokens is None else request.max_local_tokens,
            self._one_token_s,
            model.wire_s_per_block,
            model.remote_overhead_s - model.local_overhead_s,
            weights.decode,
            weights.recompute,
            weights.keep,
            weights.patience_s,
            weights.wire,
            weights.near,
            weights.near_s,
            request.spread & MAX_SPREAD,
        )
        if d == NOBODY:
            raise _no_decode_worker(fleet, request.prompt_tokens // fleet.block_size + 1)
        rows = [row for row in candidates.tolist() if row != NOBODY]
        return self._describe(d, rows, levels, weights, local_cost, remote_cost)

    def _describe(
        self, d: int, candidates: list[int], levels: npt.NDArray[np.int64], weights: Weights, local_cost: float, remote_cost: float
    ) -> Route:
        request, fleet, model = self._request, self._fleet, self._fleet.model
        prefill, decode, block_size = fleet.prefill, fleet.decode, fleet.block_size
        columns = decode.columns
        level = levels.item(len(prefill.worker_ids) + d)
        cached_tokens = block_size * self._cached_blocks[level]
        new_tokens = request.prompt_tokens - cached_tokens
        missing_blocks = max(0.0, self._decode_blocks - columns.item(BLOCKS_AVAILABLE, d))
        wait_s = columns.item(WAIT_S, d) + columns.item(S_PER_MISSING_BLOCK, d) * missing_blocks
        queue_s = max(0.0, columns.item(FREE_AT_S, d) - fleet.now_s)
        compute_s = self._typical_s[level] * columns.item(PREFILL_FACTOR, d)
        overhead_s, transfer_s = model.local_overhead_s, 0.0
        predicted_ttft_s = local_ttft_s = wait_s + queue_s + compute_s + overhead_s
        is_local = local_cost <= remote_cost
        local_tokens, remote_ttft_s = request.prompt_tokens, None
        if candidates:
            local_tokens = self._break_even_tokens(d, weights, queue_s, remote_cost)
            local_tokens = max(local_tokens, new_tokens) if is_local else min(local_tokens, new_tokens - 1)
            if request.max_local_tokens is not None:
                local_tokens = min(local_tokens, request.max_local_tokens)
            p = candidates[0]
            p_queue_s = max(0.0, prefill.columns.item(FREE_AT_S, p) - fleet.now_s)
            p_compute_s = self._typical_s[levels.item(p)] * prefill.columns.item(PREFILL_FACTOR, p)
            wire_s = (self._prompt_blocks - self._cached_blocks[level]) * model.wire_s_per_block * columns.item(WIRE_FACTOR, d)
            exposed_s = max(0.0, wire_s - p_compute_s)
            remote_ttft_s = wait_s + p_queue_s + p_compute_s + exposed_s + model.remote_overhead_s
            if not is_local:
                queue_s, compute_s, transfer_s, overhead_s = p_queue_s, p_compute_s, exposed_s, model.remote_overhead_s
                predicted_ttft_s = remote_ttft_s
        return Route(
            decode_worker_id=decode.worker_ids[d],
            prefill_worker_ids=tuple([prefill.worker_ids[row] for row in candidates]),
            is_local=is_local,
            local_prefill_tokens=local_tokens,
            prompt_tokens=request.prompt_tokens,
            num_choices=request.num_choices,
            block_size=block_size,
            decode_cached_tokens=cached_tokens,
            prefill_cached_tokens=tuple([block_size * self._cached_blocks[levels.item(row)] for row in candidates]),
            decode_blocks=self._decode_blocks,
            decode_wait_s=wait_s,
            queue_s=queue_s,
            compute_s=compute_s,
            transfer_s=transfer_s,
            overhead_s=overhead_s,
            remote_ttft_s=remote_ttft_s,
            local_ttft_s=local_ttft_s,
            predicted_ttft_s=predicted_ttft_s,
            predicted_tpot_s=columns.item(TPOT_S, d) + self._decode_blocks * columns.item(TPOT_S_PER_BLOCK, d),
            predicted_output_tokens=self._output_tokens,
        )

    def _break_even_tokens(self, d: int, weights: Weights, queue_s: float, remote_cost: float) -> int:
        """How many tokens cost as much on decode worker d as the whole detour.

        Between one token and the whole prompt the cost is taken as linear; it is convex, so this errs on the side of prefill workers.
        """
        columns, all_s, one_s = self._fleet.decode.columns, self._typical_s[0], self._one_token_s
        factor, running = columns.item(PREFILL_FACTOR, d), columns.item(NUM_RUNNING, d)

        def cost(typical_s: float) -> float:
            stall_s = (typical_s - one_s) * running
            return local_prompt_cost(typical_s * factor, stall_s, weights.decode, weights.recompute, weights.patience_s)

        wire_s = self._prompt_blocks * self._fleet.model.wire_s_per_block * columns.item(WIRE_FACTOR, d)
        one_token = queue_s + weights.keep * kept_prefix_s(all_s - one_s, wire_s) + cost(one_s)
        rest = cost(all_s) - cost(one_s)
        share = (remote_cost - one_token) / rest if rest > 0.0 else 1.0
        return int(self._request.prompt_tokens * max(0.0, min(1.0, share)))


def _no_decode_worker(fleet: FleetView, num_blocks: int) -> OutOfBlocks | PeerUnavailable:
    alive = fleet.decode.columns[WAIT_S] < np.inf
    if alive.any() and num_blocks > (largest := fleet.decode.columns[BLOCKS_TOTAL, alive].max()):
        return OutOfBlocks(f"need {num_blocks} KV blocks, the largest decode worker has {largest:.0f}")
    return PeerUnavailable("no decode worker can be reached", retry_after_s=NO_WORKER_RETRY_S)
