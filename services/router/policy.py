"""Chooses the pair of workers for a request: a pure function of the request, the prefix matches, the fleet's state and the cost model.

    cost(prefill p, decode d) = wait(d) + queue(p) + compute(p) + exposed transfer(d) + calls           predicted TTFT
                              + output tokens × (TPOT on d + what the request adds to that of others)   seconds of decoding, everybody's
                              + compute(p) once more, and a share of the transfer that is hidden        paid by those who come after
    cost(d alone)             = wait(d) + backlog(d) + compute(d) + call                                predicted TTFT
                              + output tokens × (the same)
                              + compute(d) once more + requests that run on d × compute(d)              they stand still meanwhile

All terms are seconds that somebody waits, so they may be added; weights say how much those of others count. Everything about p is
independent of d, but for the transfer, which hides behind computing: so the best p is found first, and the best d for that p, or for none,
next. That is one pass over each table. A cached prefix has no term of its own: cached tokens are tokens not computed, and a holder with a
queue loses as soon as computing elsewhere costs less.

The decode worker takes room before it calls prefill, hence wait(d) and queue(p) add up. Knows nothing of tokens, hashes or clocks.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.core.errors import OutOfBlocks, PeerUnavailable
from services.core.prefix_index import Match
from services.router.route import Route, RouteRequest
from services.router.worker_table import FleetView, Floats, WorkerTable

NUM_CANDIDATES = 4  # prefill workers that a decode worker may try
FEW_WORKERS = 16  # so many bits are faster taken one by one
MAX_RUNS = 64  # of matches looked at, longest first: with so many better holders the others do not matter
NO_WORKER_RETRY_S = 1.0  # about as long as a restart takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much seconds of different kinds count beside those of TTFT.

    decode      of each output token, for this request and for those it slows down
    recompute   of computing, as capacity that the next requests will lack: why a cached prefix is worth some queueing
    wire        of moving blocks counts at least so much, even where computing hides it: links are shared
    near        costs that differ by no more than this share of what the first token costs, or near_s, are equal: estimates are no
                better, and routers that share nothing would all pick the same worker
    """

    decode: float = 1.0
    recompute: float = 1.0
    wire: float = 0.1
    near: float = 0.002
    near_s: float = 1e-4


BALANCED = Weights()
FIRST_TOKEN_ONLY = Weights(decode=0.0, recompute=0.0, wire=0.0)


def choose(request: RouteRequest, matches: Iterable[Match], fleet: FleetView, *, weights: Weights = BALANCED) -> Route:
    """The cheapest pair whose predicted TTFT keeps the request's limit; if none does, the one with the earliest first token.

    matches   of PrefixIndex.match, fewest blocks first; slots as given to Fleet.view
    Raises PeerUnavailable when no decode worker can be chosen, OutOfBlocks when all that can are too small for the prompt.
    """
    prefixes = _Prefixes(request, matches, fleet)
    route = _Choice(request, prefixes, fleet, weights).route()
    if request.ttft_limit_s is not None and route.predicted_ttft_s > request.ttft_limit_s:
        return _Choice(request, prefixes, fleet, FIRST_TOKEN_ONLY).route()
    return route


class _Prefixes:
    """How many blocks of the prompt each worker holds: few different numbers, `cached_blocks`; `levels` has an index into them by row."""

    def __init__(self, request: RouteRequest, matches: Iterable[Match], fleet: FleetView) -> None:
        # At least one token is computed, even if all are cached.
        usable = (request.prompt_tokens - 1) // fleet.block_size
        runs = deque(matches, MAX_RUNS)
        self.cached_blocks = [0, *[min(run.num_blocks, usable) for run in runs]]
        self.levels: npt.NDArray[np.intp] = np.zeros(len(fleet.free_at_s), dtype=np.intp)
        rows, num_slots = fleet.rows_by_slot, len(fleet.rows_by_slot)
        for level, run in enumerate(runs, 1):
            workers = run.workers
            if workers.bit_count() <= FEW_WORKERS:
                while workers:
                    slot = workers.bit_length() - 1
                    self.levels[rows[slot]] = level
                    workers ^= 1 << slot
            else:
                packed = np.frombuffer(workers.to_bytes((num_slots + 7) // 8, "little"), np.uint8)
                slots = np.unpackbits(packed, bitorder="little").nonzero()[0]
                self.levels[fleet.row_column_by_slot[slots]] = level


class _Choice:
    """One pass over the tables. An operation of numpy on a thousand rows takes a microsecond, most of it for the call: there are few."""

    def __init__(self, request: RouteRequest, prefixes: _Prefixes, fleet: FleetView, weights: Weights) -> None:
        self._request, self._prefixes, self._fleet, self._weights = request, prefixes, fleet, weights
        prefill_s, block_size = fleet.model.prefill.seconds, fleet.block_size
        self._prompt_blocks = -(-request.prompt_tokens // block_size)
        self._output_tokens = fleet.model.mean_output_tokens
        if request.max_output_tokens is not None:
            self._output_tokens = min(self._output_tokens, float(request.max_output_tokens))
        self._decode_blocks = self._prompt_blocks + request.num_choices * (int(self._output_tokens) // block_size + 1)
        self._dear = 1.0 + weights.recompute
        # Computing the prompt on a typical worker, by how many blocks of it are cached there.
        self._typical_s = [prefill_s(request.prompt_tokens - n * block_size, n * block_size) for n in prefixes.cached_blocks]
        self._one_token_s = prefill_s(1, 0)

    def route(self) -> Route:
        request, fleet, weights = self._request, self._fleet, self._weights
        first = len(fleet.prefill.worker_ids)  # decode worker's row where both tables lie side by side
        by_level = self._seconds_by_level()
        by_row = np.array(by_level).take(self._prefixes.levels, axis=1, mode="clip")

        prompt_cost = by_row[0]
        prompt_cost *= fleet.prefill_factor
        prompt_cost += np.maximum(fleet.free_at_s - fleet.now_s, fleet.zeros)
        prefill_cost, local_cost = prompt_cost[:first], prompt_cost[first:-1]
        _rule_out(prefill_cost, fleet.prefill, request, self._prompt_blocks)
        p = _pick(prefill_cost, prefill_cost, request.spread, weights)

        stall_s = by_row[1, first:-1]
        stall_s *= fleet.decode.num_running
        local_cost += stall_s
        wire_s = by_row[2, first:-1]
        wire_s *= fleet.decode.costs.wire.factor
        remote_cost = None
        if p is not None:
            remote_cost = self._remote_cost(p, wire_s, max(by_level[2]))
            if request.max_local_tokens is not None:
                local_cost[self._missing_tokens(first) > request.max_local_tokens] = np.inf
        first_token_cost = local_cost if remote_cost is None else np.minimum(local_cost, remote_cost)
        cost = self._decode_cost()
        cost += first_token_cost
        _rule_out(cost, fleet.decode, request, self._prompt_blocks + 1)
        d = _pick(cost, first_token_cost, request.spread, weights)
        if d is None:
            raise _no_decode_worker(fleet, self._prompt_blocks + 1)
        if p is None or remote_cost is None:
            return self._describe(d, [], local_cost.item(d), np.inf, 0.0)
        return self._describe(d, _cheapest_rows(prefill_cost, p), local_cost.item(d), remote_cost.item(d), wire_s.item(d))

    def _seconds_by_level(self) -> tuple[list[float], list[float], list[float]]:
        """On a typical worker, by how many blocks it holds: the prompt, what those that run there lose meanwhile, the transfer."""
        # A chunk rides in a step that would have been made anyway: those that run stand still for its tokens, not for the step.
        decode, wire_s = self._weights.decode, self._fleet.model.wire_s_per_block
        return (
            [self._dear * seconds for seconds in self._typical_s],
            [decode * (seconds - self._one_token_s) for seconds in self._typical_s],
            [(self._prompt_blocks - num_blocks) * wire_s for num_blocks in self._prefixes.cached_blocks],
        )

    def _missing_tokens(self, first: int) -> npt.NDArray[np.int64]:
        """Of the prompt, on each decode worker."""
        by_level = [self._request.prompt_tokens - n * self._fleet.block_size for n in self._prefixes.cached_blocks]
        return np.array(by_level).take(self._prefixes.levels[first:-1])

    def _compute_s(self, row: int) -> float:
        """The prompt, on the worker of this row of both tables."""
        return self._typical_s[self._prefixes.levels.item(row)] * self._fleet.prefill_factor.item(row)

    def _remote_cost(self, p: int, wire_s: Floats, longest_wire_s: float) -> Floats:
        """A first token through prefill worker p, beyond what every decode worker's own would cost."""
        fleet, weights, compute_s = self._fleet, self._weights, self._compute_s(p)
        cost = weights.wire * wire_s
        # Mostly all transfers hide behind computing, and the share that counts anyway is all.
        if (1.0 - weights.wire) * longest_wire_s * fleet.decode.costs.wire.greatest > compute_s:
            cost = np.maximum(wire_s - compute_s, cost)
        queue_s = max(0.0, fleet.prefill.free_at_s.item(p) - fleet.now_s)
        cost += queue_s + self._dear * compute_s + (fleet.model.remote_overhead_s - fleet.model.local_overhead_s)
        return cost

    def _decode_cost(self) -> Floats:
        """Waiting for a place and blocks on a decode worker, and all the tokens there."""
        decode = self._fleet.decode
        num_tokens = self._weights.decode * self._request.num_choices * self._output_tokens
        cost: Floats = np.array((1.0, num_tokens, num_tokens * self._decode_blocks)).dot(decode.decode_costs)
        if self._decode_blocks > decode.least_blocks_available:
            cost += decode.s_per_missing_block * np.maximum(self._decode_blocks - decode.blocks_available, 0.0)
        return cost

    def _describe(self, d: int, candidates: list[int], local_cost: float, remote_cost: float, wire_s: float) -> Route:
        request, fleet, model = self._request, self._fleet, self._fleet.model
        prefill, decode = fleet.prefill, fleet.decode
        first = len(prefill.worker_ids)
        levels, cached_blocks, block_size = self._prefixes.levels, self._prefixes.cached_blocks, fleet.block_size
        missing_blocks = max(0.0, self._decode_blocks - decode.blocks_available.item(d))
        wait_s = decode.decode_costs.item(0, d) + decode.s_per_missing_block.item(d) * missing_blocks
        cached_tokens = block_size * cached_blocks[levels.item(first + d)]
        new_tokens = request.prompt_tokens - cached_tokens
        queue_s, prompt_s = max(0.0, decode.free_at_s.item(d) - fleet.now_s), self._compute_s(first + d)
        overhead_s, transfer_s = model.local_overhead_s, 0.0
        predicted_ttft_s = local_ttft_s = wait_s + queue_s + prompt_s + overhead_s
        is_local = local_cost <= remote_cost
        local_tokens, remote_ttft_s = request.prompt_tokens, None
        if candidates:
            local_tokens = self._break_even_tokens(d, queue_s, remote_cost)
            local_tokens = max(local_tokens, new_tokens) if is_local else min(local_tokens, new_tokens - 1)
            if request.max_local_tokens is not None:
                local_tokens = min(local_tokens, request.max_local_tokens)
            p = candidates[0]
            p_queue_s, p_prompt_s = max(0.0, prefill.free_at_s.item(p) - fleet.now_s), self._compute_s(p)
            exposed_s = max(0.0, wire_s - p_prompt_s)
            remote_ttft_s = wait_s + p_queue_s + p_prompt_s + exposed_s + model.remote_overhead_s
            if not is_local:
                queue_s, prompt_s, transfer_s, overhead_s = p_queue_s, p_prompt_s, exposed_s, model.remote_overhead_s
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
            prefill_cached_tokens=tuple([block_size * cached_blocks[levels.item(row)] for row in candidates]),
            decode_blocks=self._decode_blocks,
            decode_wait_s=wait_s,
            queue_s=queue_s,
            compute_s=prompt_s,
            transfer_s=transfer_s,
            overhead_s=overhead_s,
            remote_ttft_s=remote_ttft_s,
            local_ttft_s=local_ttft_s,
            predicted_ttft_s=predicted_ttft_s,
            predicted_tpot_s=decode.tpot_s.item(d) + self._decode_blocks * decode.tpot_s_per_block.item(d),
            predicted_output_tokens=self._output_tokens,
        )

    def _break_even_tokens(self, d: int, queue_s: float, remote_cost: float) -> int:
        """How many tokens cost as much on decode worker d as the whole detour.

        Between one token and the whole prompt the cost is taken as linear; it is convex, so this errs on the side of prefill workers.
        """
        decode = self._fleet.decode
        factor = decode.costs.prefill.factor.item(d)
        one_token = queue_s + self._dear * self._one_token_s * factor
        rest = (self._typical_s[0] - self._one_token_s) * (self._dear * factor + self._weights.decode * decode.num_running.item(d))
        share = (remote_cost - one_token) / rest if rest > 0.0 else 1.0
        return int(self._request.prompt_tokens * max(0.0, min(1.0, share)))


def _rule_out(cost: Floats, table: WorkerTable, request: RouteRequest, num_blocks: int) -> None:
    """Makes workers infinitely dear that this request must not have: too small a pool, or failed already."""
    if num_blocks > table.least_blocks_total:
        cost[table.blocks_total < num_blocks] = np.inf
    for worker_id in request.excluded:
        if worker_id in table.worker_ids:
            cost[table.worker_ids.index(worker_id)] = np.inf


def _pick(cost: Floats, first_token_cost: Floats, spread: int, weights: Weights) -> int | None:
    """One of the rows whose cost is next to the least. None: all are infinite."""
    if not len(cost):
        return None
    best = int(cost.argmin())
    least = cost.item(best)
    if least == np.inf:
        return None
    near = (cost <= least + max(weights.near_s, weights.near * first_token_cost.item(best))).nonzero()[0]
    return near.item(spread % len(near))


def _cheapest_rows(cost: Floats, best: int) -> list[int]:
    """Up to NUM_CANDIDATES rows of finite cost, cheapest first but for the one that was picked. Spoils `cost`."""
    rows = [best]
    while len(rows) < NUM_CANDIDATES:
        cost[rows[-1]] = np.inf
        row = int(cost.argmin())
        if cost.item(row) == np.inf:
            break
        rows.append(row)
    return rows


def _no_decode_worker(fleet: FleetView, num_blocks: int) -> OutOfBlocks | PeerUnavailable:
    alive = fleet.decode.decode_costs[0] < np.inf
    if alive.any() and num_blocks > (largest := fleet.decode.blocks_total[alive].max()):
        return OutOfBlocks(f"need {num_blocks} KV blocks, the largest decode worker has {largest:.0f}")
    return PeerUnavailable("no decode worker can be reached", retry_after_s=NO_WORKER_RETRY_S)
