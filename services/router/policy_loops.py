"""The policy's loop over all workers, which Numba compiles: a thousand workers take a few microseconds, in NumPy's calls they take fifty.

Everything that the compiled code reads is in this file, the numbering of the columns too: Numba compiles anew when this file has changed,
and does not look at files it imports from. What the terms mean is said in policy.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Function = TypeVar("Function", bound=Callable[..., Any])

# Columns of a WorkerTable, which says what they hold; those after WIRE_FACTOR are not read here.
(
    FREE_AT_S,
    PREFILL_FACTOR,
    BLOCKS_TOTAL,
    WAIT_S,
    TOKEN_COST_S,
    TOKEN_COST_S_PER_BLOCK,
    NUM_RUNNING,
    BLOCKS_AVAILABLE,
    S_PER_MISSING_BLOCK,
    WIRE_FACTOR,
    STEP_FACTOR,
    TPOT_S,
    TPOT_S_PER_BLOCK,
    REPORTED_S,
    NUM_COLUMNS,
) = range(15)

NOBODY = -1


def jit(function: Function) -> Function:
    """Compiles when first called, and keeps the result on disk where it can."""
    try:
        return cast(Function, numba.njit(cache=True, error_model="numpy")(function))
    except RuntimeError:  # no folder to keep it in: a read-only file system
        return cast(Function, numba.njit(error_model="numpy")(function))


@jit
def local_prompt_cost(compute_s: float, stall_s: float, decode_weight: float, recompute_weight: float, patience_s: float) -> float:
    """What computing a prompt on a decode worker costs, its queue not counted. `stall_s`: over all requests that stand still meanwhile."""
    noticed = compute_s / (compute_s + patience_s + 1e-12)
    return compute_s + noticed * (recompute_weight * compute_s + decode_weight * stall_s)


@jit
def kept_prefix_s(prompt_s: float, wire_s: float) -> float:
    """What a prompt's prefix on prefill workers is worth: computing it, less what moving it takes beyond that.

    Not less all of moving it: what is known of links is often no more than that they were as fast as computing, which hides the rest.
    """
    return max(0.0, prompt_s - max(0.0, wire_s - prompt_s))


@jit
def choose_rows(
    candidates: npt.NDArray[np.int64],
    levels: npt.NDArray[np.int64],
    prefill: Floats,
    decode: Floats,
    packed: npt.NDArray[np.uint8],
    row_by_slot: npt.NDArray[np.int64],
    by_level: Floats,
    excluded: npt.NDArray[np.int64],
    now_s: float,
    prompt_tokens: int,
    block_size: int,
    decode_blocks: int,
    decode_tokens: float,
    max_local_tokens: int,
    one_token_s: float,
    wire_s_per_block: float,
    overhead_s: float,
    decode_weight: float,
    recompute_weight: float,
    keep_weight: float,
    patience_s: float,
    wire_weight: float,
    near: float,
    near_s: float,
    spread: int,
) -> tuple[int, float, float]:
    """The best pair: the decode worker's row, and what the first token costs from it alone and through the best prefill worker.

    candidates        is filled with rows of prefill workers, the picked one first; NOBODY where there is none
    levels            [joint rows], zeros, is filled with each worker's. Joint rows count on from prefill to decode; the last is nobody's
    prefill, decode   columns of the two tables
    packed            for each level from 1 on a bitmask of the workers on it; slot s is bit s % 8 of byte s // 8
    row_by_slot       joint rows
    by_level          [2, levels]: seconds of the prompt on a typical worker of that level; how many of its blocks such a worker holds
    excluded          joint rows
    decode_tokens     over all choices
    max_local_tokens  negative: no limit
    overhead_s        of going through a prefill worker, beyond that of not doing so
    """
    num_prefill, num_decode = prefill.shape[1], decode.shape[1]
    prompt_blocks = -(-prompt_tokens // block_size)
    _set_levels(levels, packed, row_by_slot, by_level.shape[1])

    prefill_cost = np.empty(num_prefill)
    for row in range(num_prefill):
        compute_s = by_level[0, levels[row]] * prefill[PREFILL_FACTOR, row]
        prefill_cost[row] = max(0.0, prefill[FREE_AT_S, row] - now_s) + (1.0 + recompute_weight) * compute_s
        if prompt_blocks > prefill[BLOCKS_TOTAL, row]:
            prefill_cost[row] = np.inf
    for row in excluded:
        if row < num_prefill:
            prefill_cost[row] = np.inf
    p = _pick(prefill_cost, prefill_cost, near, near_s, spread)
    p_cost = p_compute_s = np.inf
    if p != NOBODY:
        p_cost, p_compute_s = prefill_cost[p], by_level[0, levels[p]] * prefill[PREFILL_FACTOR, p]

    local_cost, remote_cost = np.empty(num_decode), np.empty(num_decode)
    first_token_cost, cost = np.empty(num_decode), np.empty(num_decode)
    for row in range(num_decode):
        typical_s, held = by_level[0, levels[num_prefill + row]], by_level[1, levels[num_prefill + row]]
        compute_s = typical_s * decode[PREFILL_FACTOR, row]
        # A chunk rides in a step that would have been made anyway: those that run stand still for its tokens, not for the step.
        stall_s = (typical_s - one_token_s) * decode[NUM_RUNNING, row]
        local_s = local_prompt_cost(compute_s, stall_s, decode_weight, recompute_weight, patience_s)
        kept_s = kept_prefix_s(by_level[0, 0] - one_token_s, prompt_blocks * wire_s_per_block * decode[WIRE_FACTOR, row])
        local_cost[row] = max(0.0, decode[FREE_AT_S, row] - now_s) + local_s + keep_weight * kept_s
        wire_s = (prompt_blocks - held) * wire_s_per_block * decode[WIRE_FACTOR, row]
        remote_cost[row] = p_cost + max(wire_s - p_compute_s, wire_weight * wire_s) + overhead_s
        if p != NOBODY and 0 <= max_local_tokens < prompt_tokens - held * block_size:
            local_cost[row] = np.inf
        first_token_cost[row] = min(local_cost[row], remote_cost[row])
        token_s = decode[TOKEN_COST_S, row] + decode_blocks * decode[TOKEN_COST_S_PER_BLOCK, row]
        wait_s = decode[WAIT_S, row] + max(0.0, decode_blocks - decode[BLOCKS_AVAILABLE, row]) * decode[S_PER_MISSING_BLOCK, row]
        cost[row] = first_token_cost[row] + decode_weight * decode_tokens * token_s + wait_s
        if prompt_tokens // block_size + 1 > decode[BLOCKS_TOTAL, row]:  # for the prompt and a token
            cost[row] = np.inf
    for row in excluded:
        if row >= num_prefill:
            cost[row - num_prefill] = np.inf
    d = _pick(cost, first_token_cost, near, near_s, spread)

    for i in range(len(candidates)):
        candidates[i] = p
        if p != NOBODY:
            prefill_cost[p] = np.inf
            p = _cheapest(prefill_cost)
    if d == NOBODY:
        return d, np.inf, np.inf
    return d, local_cost[d], remote_cost[d]


@jit
def _set_levels(levels: npt.NDArray[np.int64], packed: npt.NDArray[np.uint8], row_by_slot: npt.NDArray[np.int64], num_levels: int) -> None:
    num_bytes = len(packed) // max(1, num_levels - 1)
    for index in range(len(packed)):
        bits, slot = int(packed[index]), index % num_bytes * 8
        while bits:
            if bits & 1 and slot < len(row_by_slot):
                levels[row_by_slot[slot]] = index // num_bytes + 1
            bits >>= 1
            slot += 1


@jit
def _pick(cost: Floats, first_token_cost: Floats, near: float, near_s: float, spread: int) -> int:
    """One of the rows whose cost is next to the least, in turn by `spread`; NOBODY when all are infinite."""
    best = _cheapest(cost)
    if best == NOBODY:
        return best
    limit = cost[best] + max(near_s, near * first_token_cost[best])
    num_near = 0
    for row in range(len(cost)):
        num_near += cost[row] <= limit
    turn = spread % num_near
    for row in range(len(cost)):
        if cost[row] <= limit:
            if turn == 0:
                best = row
                break
            turn -= 1
    return best


@jit
def _cheapest(cost: Floats) -> int:
    best, least = NOBODY, np.inf
    for row in range(len(cost)):
        if cost[row] < least:
            best, least = row, cost[row]
    return best
