"""What the figures mean. One place, so that a run, a simulation and a report cannot mean different things by one word.

TTFT      first token − intended time of the request
TPOT      (last token − first token) ÷ (tokens − 1), one value for each request of at least two tokens: vLLM's TPOT, AIPerf's and
          GuideLLM's "ITL"
E2E       last token − intended time
reuse     prompt tokens that were not computed again ÷ prompt tokens, summed over all requests that ended: Mooncake's token ratio, not
          the mean of each request's
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean and percentiles; between two values the percentile lies on the line that joins them, as NumPy and vLLM have it."""

    mean: float
    p50: float
    p90: float
    p99: float


def distribution(values: Sequence[float]) -> Distribution | None:
    """None when there is nothing to describe."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return Distribution(mean=float(np.mean(values)), p50=p50, p90=p90, p99=p99)
