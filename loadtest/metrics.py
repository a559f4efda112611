"""What the figures mean. One place, so that a run, a simulation and a report cannot mean different things by one word.

Of one request; every time counts from `at_s`, when the schedule wanted it sent:

TTFT      first token − intended time of the request; "as sent": − the time it really left
TPOT      (last token − first token) ÷ (tokens − 1), one value for each request of at least two tokens: vLLM's TPOT, AIPerf's and
          GuideLLM's "ITL"
ITL       each single gap between two chunks that brought tokens, all requests in one heap: vLLM's ITL, AIPerf's "ICL"
E2E       end of the answer − intended time, of requests that completed
lag       real − intended time of sending: the sender's fault, never the server's
residual  E2E − the sum of the stages that the server told: what nobody accounts for
good      completed, first token and TPOT both within the objective

Of a run:

offered       requests of the schedule, sent or not. Refused, failed and unsent ones count in every ratio below
attainment    good ÷ offered, with Wilson's 95 % interval; a tenant's own: its good ÷ its offered
goodput       good per second of the schedule: attainment × offered rate
rates         offered and goodput per second of the schedule; achieved: completed per second until the last answer ended
Jain          of the tenants' attainments: 1 when all fare alike, 1 ÷ tenants when one alone is served
reuse         prompt tokens that were not computed again ÷ prompt tokens, summed over all requests that completed: Mooncake's token ratio.
              The request mean, the mean of each request's own ratio, is another figure and is called so
tokens per worker-second   output tokens ÷ (workers × seconds until the last answer ended)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean and percentiles; between two values the percentile lies on the line that joins them, as NumPy and vLLM have it."""

    mean: float
    p50: float
    p90: float
    p99: float


def distribution(values: Sequence[float] | NDArray[np.float64]) -> Distribution | None:
    """None when there is nothing to describe."""
    if not len(values):
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return Distribution(mean=float(np.mean(values)), p50=p50, p90=p90, p99=p99)


def jain_index(values: Sequence[float]) -> float | None:
    """(Σx)² ÷ (n Σx²), between 1 ÷ n and 1. None for no values, and when all are zero: nobody is served, nobody is favoured.

    Source: Jain, Chiu and Hawe 1984.
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Between what the true share may lie. It stays within 0 and 1 and has a width even when all succeed; (0, 1) for no trials.

    Source: Wilson 1927.
    """
    if not trials:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    scale = 1 + z * z / trials
    middle = share + z * z / (2 * trials)
    reach = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # Rounding leaves 1e-17 where the ends are exactly 0 or 1.
    low = 0.0 if successes == 0 else (middle - reach) / scale
    high = 1.0 if successes == trials else (middle + reach) / scale
    return low, high


def newcombe_interval(before: tuple[int, int], after: tuple[int, int], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Between what the difference of two shares, after − before, may lie; each is given as (successes, trials).

    Source: Newcombe 1998, method 10: the two Wilson intervals joined.
    """
    share_before, share_after = (successes / trials if trials else 0.5 for successes, trials in (before, after))
    low_before, high_before = wilson_interval(*before, confidence)
    low_after, high_after = wilson_interval(*after, confidence)
    difference = share_after - share_before
    low = difference - math.hypot(share_after - low_after, high_before - share_before)
    high = difference + math.hypot(high_after - share_after, share_before - low_before)
    return low, high
