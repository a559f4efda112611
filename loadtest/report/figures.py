"""The figures that comparisons compare, each with its value, its direction, and its values over resamples of the requests."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.metrics import Distribution
from loadtest.records import Outcome, RequestRecord
from loadtest.report.bootstrap import Draws, Weights, mean_draws, percentile_draws, ratio_draws, resample
from loadtest.result import Result

Counts = tuple[int, int]  # how many of how many

# Gaps × resamples; more gaps than that are sampled.
MAX_GAP_CELLS = 8_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """
    unit             share, ms, /s, bytes or index
    more_is_better   None: neither
    counts           of a share of requests
    draws            over resamples; None: not known
    gates            a worsening is reason to fail a comparison
    """

    name: str
    unit: str
    value: float
    more_is_better: bool | None
    counts: Counts | None = None
    draws: Draws | None = None
    gates: bool = True


class Sample:
    """One run's requests, by their index in the schedule, and resamples of them."""

    def __init__(self, records: Sequence[RequestRecord], result: Result, *, seed: int) -> None:
        self.records = sorted(records, key=lambda record: record.index)
        self.result = result
        self.weights = resample(len(records), seed=seed)
        self._seed = seed

    def values(self, of: Callable[[RequestRecord], float | None]) -> NDArray[np.float64]:
        """One value for each request that completed; NaN for the others."""
        values = (of(record) if record.outcome is Outcome.COMPLETED else None for record in self.records)
        return np.array([np.nan if value is None else value for value in values])

    def gaps_ms(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Gaps between chunks, and whose each is: gaps of one request are resampled together."""
        values = [gap * 1e3 for record in self.records if record.outcome is Outcome.COMPLETED for gap in record.gaps_s]
        counts = [len(record.gaps_s) if record.outcome is Outcome.COMPLETED else 0 for record in self.records]
        found, owners = np.array(values), np.repeat(np.arange(len(counts)), counts)
        if len(found) * len(self.weights) > MAX_GAP_CELLS:
            kept = np.random.default_rng(self._seed).choice(len(found), MAX_GAP_CELLS // len(self.weights), replace=False)
            return found[kept], owners[kept]
        return found, owners


def figures_of(sample: Sample) -> list[Figure]:
    """All that the run has, in the order in which people ask for them."""
    return [*_shares(sample), *_latencies(sample), *_reuse(sample), *_rates(sample), *_stages(sample)]


def _shares(sample: Sample) -> Iterator[Figure]:
    summary, objective = sample.result.summary, sample.result.objective
    # Which requests are good decides; the others say why.
    shares = (
        ("attainment", summary.good, True),
        ("refused", summary.refused, False),
        ("failed", summary.failed, False),
    )
    for name, count, more_is_better in shares:
        yield Figure(
            name=name,
            unit="share",
            value=count / summary.offered,
            more_is_better=more_is_better,
            counts=(count, summary.offered),
        )
    if summary.goodput is not None and summary.duration_s:
        good = mean_draws(np.array([float(record.is_good(objective)) for record in sample.records]), sample.weights)
        yield Figure(
            name="goodput", unit="/s", value=summary.goodput, more_is_better=True, draws=good * summary.offered / summary.duration_s
        )
    if summary.jain is not None:
        yield Figure(name="Jain's index of tenants", unit="index", value=summary.jain, more_is_better=True, gates=False)


def _latencies(sample: Sample) -> Iterator[Figure]:
    summary = sample.result.summary
    per_request: tuple[tuple[str, Distribution | None, Callable[[RequestRecord], float | None]], ...] = (
        ("TTFT", summary.ttft_ms, lambda record: record.ttft_s),
        ("TTFT as sent", summary.ttft_as_sent_ms, _ttft_as_sent_s),
        ("TPOT", summary.tpot_ms, lambda record: record.tpot_s),
        ("E2E", summary.e2e_ms, lambda record: record.e2e_s),
    )
    for name, found, of in per_request:
        if found is not None:
            values_ms = sample.values(of) * 1e3
            yield from _distribution(
                name, found, mean_draws(values_ms, sample.weights), values_ms, sample.weights, gates=name != "TTFT as sent"
            )
    if summary.itl_ms is not None:
        gaps_ms, owners = sample.gaps_ms()
        weights = sample.weights[:, owners]
        yield from _distribution("ITL", summary.itl_ms, mean_draws(gaps_ms, weights), gaps_ms, weights, gates=True)
    if summary.lag_ms is not None:
        yield Figure(name="send lag p99", unit="ms", value=summary.lag_ms.p99, more_is_better=None)


def _distribution(
    name: str, found: Distribution, means: Draws, values_ms: NDArray[np.float64], weights: Weights, *, gates: bool
) -> Iterator[Figure]:
    p50, p90, p99 = percentile_draws(values_ms, weights, (50, 90, 99))
    for label, value, draws in (("mean", found.mean, means), ("p50", found.p50, p50), ("p90", found.p90, p90), ("p99", found.p99, p99)):
        yield Figure(name=f"{name} {label}", unit="ms", value=value, more_is_better=False, draws=draws, gates=gates)


def _reuse(sample: Sample) -> Iterator[Figure]:
    summary = sample.result.summary
    parts: tuple[tuple[str, float | None, Callable[[RequestRecord], int]], ...] = (
        ("reuse", summary.reuse, lambda record: record.cached_tokens or 0),
        ("reuse on prefill workers", summary.prefix_reuse, lambda record: record.prefill_cached_tokens),
        ("reuse on decode workers", summary.decode_reuse, lambda record: record.decode_cached_tokens),
    )
    told = sample.values(lambda record: None if record.cached_tokens is None else record.input_tokens)
    for name, value, of in parts:
        if value is not None:
            cached = np.where(np.isnan(told), 0.0, np.nan_to_num(sample.values(of)))
            draws = ratio_draws(cached, np.nan_to_num(told), sample.weights)
            yield Figure(name=name, unit="share", value=value, more_is_better=True, draws=draws, gates=name == "reuse")


def _rates(sample: Sample) -> Iterator[Figure]:
    summary = sample.result.summary
    rates = (
        ("offered rate", "/s", summary.offered_rate, None),
        ("achieved rate", "/s", summary.achieved_rate, True),
        ("output tokens per worker", "/s", summary.tokens_per_worker_s, True),
        ("KV moved", "bytes", summary.kv_bytes or None, None),
    )
    for name, unit, value, more_is_better in rates:
        if value is not None:
            yield Figure(name=name, unit=unit, value=float(value), more_is_better=more_is_better, gates=False)


def _stages(sample: Sample) -> Iterator[Figure]:
    """Where a difference comes from; one stage may grow while the whole does not."""
    for stage, found in sample.result.summary.stages_ms.items():
        values_ms = sample.values(lambda record, stage=stage: record.stages.get(stage, 0.0) * 1e3 if record.stages else None)  # type: ignore[misc]
        draws = mean_draws(values_ms, sample.weights)
        name = f"stage {stage.replace('_', ' ')}, mean"
        yield Figure(name=name, unit="ms", value=found.mean, more_is_better=False, draws=draws, gates=False)


def _ttft_as_sent_s(record: RequestRecord) -> float | None:
    return None if record.first_token_s is None or record.sent_s is None else record.first_token_s - record.sent_s
