"""Does the backlog grow? Above its capacity a cluster's latencies measure how long the run was, not the cluster.

Open requests (arrived, not ended) are averaged over equal stretches of the schedule, the first quarter left out since every run starts
empty, and a line is laid through them. A backlog remembers: neighbouring stretches are alike, and the usual standard error of a slope
would call every long queue a growing one. So the error is that of a random walk with the steps seen, which is what a queue near or above
its capacity is. Of a steady queue it is too large, since steps up are followed by steps down there: that errs on the side of "steady".
"""

from collections.abc import Sequence
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

from loadtest.records import RequestRecord

NUM_STRETCHES = 32
WARM_UP_SHARE = 0.25
CONFIDENCE = 0.99
# A slope may be certain and yet too small to matter: so much of what arrives must stay.
MIN_GROWTH_SHARE = 0.01


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """
    slope_per_s      requests by which the backlog grows each second
    t_statistic      the slope in units of its standard error
    open_mean        requests open on average, without the warm-up
    open_at_end      requests open when the last one arrived
    grows            the slope is certain (one-sided, 99 %) and at least 1 % of the arrivals stay
    """

    slope_per_s: float
    t_statistic: float
    open_mean: float
    open_at_end: int
    grows: bool


def backlog(records: Sequence[RequestRecord], *, duration_s: float) -> Backlog | None:
    """Whether open requests pile up while the schedule lasts. None for a run too short to say: fewer arrivals than stretches.

    A request that never ended stays open; one that was never sent is the sender's backlog and does not count.
    """
    sent = [record for record in records if record.sent_s is not None]
    if len(sent) < NUM_STRETCHES or duration_s <= 0:
        return None
    begun_s = np.sort([record.at_s for record in sent])
    ended_s = np.sort([record.finished_s for record in sent if record.finished_s is not None])
    edges_s = np.linspace(WARM_UP_SHARE * duration_s, duration_s, NUM_STRETCHES + 1)
    means = (_open_seconds(begun_s, edges_s) - _open_seconds(ended_s, edges_s)) / np.diff(edges_s)
    slope_per_s, t_statistic = _slope((edges_s[1:] + edges_s[:-1]) / 2, means)
    arrival_rate = len(sent) / duration_s
    is_certain = t_statistic > _t_quantile(CONFIDENCE, NUM_STRETCHES - 2)
    return Backlog(
        slope_per_s=slope_per_s,
        t_statistic=t_statistic,
        open_mean=float(means.mean()),
        open_at_end=int(np.searchsorted(begun_s, duration_s, "right") - np.searchsorted(ended_s, duration_s, "right")),
        grows=bool(is_certain and slope_per_s >= MIN_GROWTH_SHARE * arrival_rate),
    )


def _open_seconds(events_s: NDArray[np.float64], edges_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each stretch, the integral of how many events lie before."""
    sums_s = np.concatenate([[0.0], np.cumsum(events_s)])
    before = np.searchsorted(events_s, edges_s, "right")
    return np.diff(before * edges_s - sums_s[before])


def _slope(times_s: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[float, float]:
    """Least squares; returns the slope and its t-statistic if the values were a random walk."""
    apart_s = times_s - times_s.mean()
    weights = apart_s / (apart_s @ apart_s)
    slope = float(weights @ values)
    steps = np.diff(values)
    # A step moves all the values after it: its weight in the slope is the sum of theirs.
    reach = np.cumsum(weights[::-1])[::-1][1:]
    error = float(np.std(steps, ddof=1) * np.sqrt(reach @ reach))
    # A straight line, up to rounding, is as certain as can be, unless it is flat.
    if error <= 1e-12 * max(1.0, abs(slope)):
        return slope, 0.0 if abs(slope) < 1e-12 else float(np.copysign(1e9, slope))
    return slope, slope / error


def _t_quantile(share: float, freedom: int) -> float:
    """Of Student's distribution, by the normal one's and its Cornish-Fisher terms: within 0.5 % from 10 degrees of freedom on."""
    z = NormalDist().inv_cdf(share)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
