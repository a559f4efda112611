"""A workload like a production chat service's, from a seed: nothing has to be downloaded for it.

It has the marginals of Mooncake's released conversation trace (an hour, 12,031 requests at 3.4/s). What was published or counted of it:

    input tokens     mean 12,035, p50 6,909, p90 27,367, p99 85,400; from 891 to 126,000
    output tokens    mean 343, p50 350, p90 597, p99 1,118; at most 2,000
    shared           one system block of 512 tokens by all; 61 % of the requests share no more
    conversations    the others continue an earlier prompt, sent 123 s before in the median, 483 s at p90
    reusable input   37.3 % with a cache that never evicts, over the hour; 34.7 % of its first half alone

Inputs are log-normal, which meets all four figures. Outputs are log-normal in three pieces, through the median, p90 and p99; the piece
below the median has the slope that gives the mean. A conversation is a chain of prompts, each the one before and more; their lengths are
drawn together (correlated, each log-normal) and put in order, so that chains do not change the distribution of lengths. How closely
they are correlated is what sets the reuse. Short runs have less of it: nobody comes back before having thought.
Source: Qin et al. 2025 (Mooncake, FAST '25), github.com/kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import log
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from loadtest.schedule import PlannedRequest, Schedule
from loadtest.traces.arrivals import Stream, arrival_times, generator
from loadtest.traces.block_ids import BlockIds

RATE = 3.4
BLOCK_SIZE = 512
SYSTEM_TOKENS = 512
THINK_S = 123.0

_Z90, _Z99 = NormalDist().inv_cdf(0.9), NormalDist().inv_cdf(0.99)
_INPUT_MEDIAN, _INPUT_P90, _INPUT_RANGE = 6909, 27367, (891, 126_000)
_INPUT_SIGMA = log(_INPUT_P90 / _INPUT_MEDIAN) / _Z90
_OUTPUT_MEDIAN, _OUTPUT_P90, _OUTPUT_P99, _OUTPUT_MAX = 350, 597, 1118, 2000
_OUTPUT_SIGMA_BELOW = 1.2
_THINK_SIGMA = log(483 / 123) / _Z90
_CONTINUED = 0.43  # in the long run; within an hour 39 % come back
_CORRELATION = 0.9


@dataclass(slots=True)
class _Conversation:
    """
    lengths   of its prompts still to come, the next one last
    runs      blocks of the prompt sent last
    sent      index of that request
    """

    name: str
    tenant: int
    lengths: list[int]
    runs: list[tuple[int, int]] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    sent: int | None = None


def generate(
    num_requests: int,
    *,
    rate: float = RATE,
    burstiness: float = 1.0,
    num_tenants: int = 1,
    think_s: float = THINK_S,
    sessions: bool = False,
    block_size: int = BLOCK_SIZE,
    seed: int = 0,
) -> Schedule:
    """So many requests.

    rate          requests a second, later turns too
    burstiness    of all arrivals, as in arrivals.py
    num_tenants   the first has most conversations, the n-th a n-th of that; each has a system block of its own
    think_s       median time between two prompts of a conversation
    sessions      a later turn waits for the answer to the one before, and then thinks as long as lies between the two; else it has a time
    """
    block_ids = BlockIds()
    # Of blocks that it does not fill nothing is shared.
    systems = [block_ids.take(SYSTEM_TOKENS // block_size) for _ in range(num_tenants)]
    times_s = arrival_times(num_requests, rate=rate, burstiness=burstiness, seed=seed)
    outputs = _output_lengths(generator(seed, Stream.LENGTHS).standard_normal(num_requests))
    thinking = generator(seed, Stream.THINKING)
    new = _conversations(num_tenants, seed)
    thinkers: list[tuple[float, int, _Conversation]] = []  # (ready at, number of the request before, who)
    requests: list[PlannedRequest] = []
    for index, (at_s, output_tokens) in enumerate(zip(times_s, outputs, strict=True)):
        # Whoever has thought enough takes the next arrival, so that conversations leave the arrival process what it is.
        talk = heapq.heappop(thinkers)[2] if thinkers and thinkers[0][0] <= at_s else next(new)
        before = talk.sent
        _prompt(talk, systems[talk.tenant], block_ids, block_size)
        is_waiting = sessions and before is not None
        requests.append(
            PlannedRequest(
                at_s=0.0 if is_waiting else at_s,
                input_tokens=talk.input_tokens,
                output_tokens=output_tokens,
                block_runs=tuple(talk.runs),
                session=talk.name if sessions else "",
                after=before if is_waiting else None,
                think_s=at_s - times_s[before] if sessions and before is not None else 0.0,
                tenant=f"tenant-{talk.tenant}" if num_tenants > 1 else "",
            )
        )
        talk.output_tokens, talk.sent = output_tokens, index
        if talk.lengths:
            heapq.heappush(thinkers, (at_s + think_s * thinking.lognormal(0.0, _THINK_SIGMA), index, talk))
    kind = f"{rate:g}/s, burstiness {burstiness:g}, {num_tenants} tenants, think time {think_s:g} s{', sessions' if sessions else ''}"
    return Schedule(block_size=block_size, requests=tuple(requests), source=f"generated: {kind}, seed {seed}", seed=seed)


def _conversations(num_tenants: int, seed: int) -> Iterator[_Conversation]:
    """Without end."""
    rng, choosing = generator(seed, Stream.CONVERSATIONS), generator(seed, Stream.TENANTS)
    shares = np.array([1 / (tenant + 1) for tenant in range(num_tenants)])
    number = 0
    while True:
        num_turns = int(rng.geometric(1 - _CONTINUED))
        common, own = rng.standard_normal(), rng.standard_normal(num_turns)
        lengths = np.exp(log(_INPUT_MEDIAN) + _INPUT_SIGMA * (np.sqrt(_CORRELATION) * common + np.sqrt(1 - _CORRELATION) * own))
        tenant = int(choosing.choice(num_tenants, p=shares / shares.sum()))
        descending = sorted(np.clip(lengths.astype(int), *_INPUT_RANGE).tolist(), reverse=True)
        yield _Conversation(f"conversation-{number}", tenant, descending)
        number += 1


def _output_lengths(normal: npt.NDArray[np.float64]) -> Sequence[int]:
    """Lengths for draws of a standard normal."""
    logs = np.interp(
        normal,
        [-9.0, 0.0, _Z90, _Z99, 9.0],
        [
            log(_OUTPUT_MEDIAN) - 9.0 * _OUTPUT_SIGMA_BELOW,
            log(_OUTPUT_MEDIAN),
            log(_OUTPUT_P90),
            log(_OUTPUT_P99),
            log(_OUTPUT_P99) + (9.0 - _Z99) * log(_OUTPUT_P99 / _OUTPUT_P90) / (_Z99 - _Z90),
        ],
    )
    lengths: list[int] = np.clip(np.exp(logs), 1, _OUTPUT_MAX).astype(int).tolist()
    return lengths


def _prompt(talk: _Conversation, system: tuple[int, int], block_ids: BlockIds, block_size: int) -> None:
    """Makes the conversation's next prompt: the full blocks of the one before, or of the system prompt, and new ones behind."""
    if talk.sent is None:
        shared = _first_blocks([system], system[1])
        talk.input_tokens = talk.lengths.pop()
    else:
        shared = _first_blocks(talk.runs, talk.input_tokens // block_size)
        # The answer and a word more have to fit behind what was there.
        talk.input_tokens = max(talk.lengths.pop(), talk.input_tokens + talk.output_tokens + 1)
    missing = -(-talk.input_tokens // block_size) - sum(count for _, count in shared)
    assert missing > 0  # the shortest first prompt is longer than the system prompt, a later one than the one before
    talk.runs = [*shared, block_ids.take(missing)]


def _first_blocks(runs: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    first: list[tuple[int, int]] = []
    for start, length in runs:
        if count > 0:
            first.append((start, min(length, count)))
            count -= length
    return first
