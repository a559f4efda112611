"""How far a figure might have come out otherwise: its values over resamples of the requests.

Requests that came after one another waited in the same queues, so blocks of consecutive ones are drawn rather than single ones: single ones
would make an interval too narrow. A resample is kept as how often it has each request.
Source: Künsch 1989 (moving blocks), in the circular form of Politis and Romano 1992; Hall, Horowitz and Jing 1995 for blocks of ∛n.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]  # [resamples, requests]
Draws = NDArray[np.float64]  # [resamples]

MAX_RESAMPLES, MIN_RESAMPLES = 1000, 200
# Requests × resamples: what a comparison of two long runs has time and memory for.
MAX_CELLS = 6_000_000


def resample(num_requests: int, *, seed: int) -> Weights:
    """Draws blocks, 2 ∛n requests long, until each resample has as many requests as there are; the last block is cut."""
    num_resamples = int(np.clip(MAX_CELLS // max(num_requests, 1), MIN_RESAMPLES, MAX_RESAMPLES))
    length = max(1, min(num_requests, round(2 * num_requests ** (1 / 3))))
    num_blocks = -(-num_requests // length)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, max(num_requests, 1), (num_resamples, num_blocks))
    lengths = np.full(num_blocks, length)
    lengths[-1:] = num_requests - length * (num_blocks - 1)
    # +1 where a block starts, −1 behind its end; the running sum is how many blocks lie over a request. Ends may lie behind the run's.
    width = num_requests + length + 1
    rows = np.arange(num_resamples)[:, None] * width
    size = num_resamples * width
    edges = np.bincount((rows + starts).ravel(), minlength=size) - np.bincount((rows + starts + lengths).ravel(), minlength=size)
    covered = np.cumsum(edges.reshape(num_resamples, width), axis=1)
    weights: Weights = covered[:, :num_requests].astype(np.float64)
    weights[:, :length] += covered[:, num_requests : num_requests + length]
    return weights


def mean_draws(values: NDArray[np.float64], weights: Weights) -> Draws:
    """Means over resamples; requests without a value (NaN) do not count. NaN for a resample that has none."""
    known = ~np.isnan(values)
    return ratio_draws(np.where(known, values, 0.0), known.astype(np.float64), weights)


def ratio_draws(parts: NDArray[np.float64], wholes: NDArray[np.float64], weights: Weights) -> Draws:
    """Σ parts ÷ Σ wholes over resamples."""
    total = weights @ wholes
    draws: Draws = np.divide(weights @ parts, total, out=np.full(len(weights), np.nan), where=total > 0)
    return draws


def percentile_draws(values: NDArray[np.float64], weights: Weights, percentiles: Sequence[float]) -> list[Draws]:
    """Percentiles over resamples: the smallest value with at least that share of the weight at or below. NaN values do not count."""
    order = np.argsort(values)[: int(np.count_nonzero(~np.isnan(values)))]  # NaN comes last
    if not len(order):
        return [np.full(len(weights), np.nan) for _ in percentiles]
    ordered = values[order]
    found = [np.empty(len(weights)) for _ in percentiles]
    for row, weight in enumerate(weights):
        reached = np.cumsum(weight[order])
        for draws, percentile in zip(found, percentiles, strict=True):
            position = int(np.searchsorted(reached, reached[-1] * percentile / 100))
            draws[row] = ordered[min(position, len(ordered) - 1)] if reached[-1] else np.nan
    return found
