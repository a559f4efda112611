"""Is one run better than another? Every figure of both, the difference, and whether it is more than chance.

A figure differs significantly when zero is outside its 95 % interval and also outside one so wide that, of all the figures together, one in
twenty comparisons of equal runs has any that differs (Bonferroni): with thirty figures at 95 % each, some always would. Two runs of one
schedule are resampled together, request by request, since what both were asked cancels out of their difference.

Shares of requests have Newcombe's interval, all else the bootstrap's. Newcombe's takes requests for independent of one another: sixty
failures in a row, which a bootstrap of blocks would call one event that may as well have happened in the other run, are sixty failures.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import msgspec
import numpy as np

from loadtest.files import BadInput
from loadtest.metrics import CONFIDENCE, newcombe_interval
from loadtest.records import RequestRecord
from loadtest.report.figures import Figure, Sample, figures_of
from loadtest.report.judge import judged_by
from loadtest.result import Result

SEED = 20


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of both runs.

    before, after, change    in the figure's unit; change = after − before. None: this run does not have it
    low, high                95 % interval of the change; None: not known
    significant              more than chance
    better                   whether the change is for the better; None: neither, or no change
    gates                    a worsening of this figure alone is reason to fail a comparison
    """

    name: str
    unit: str
    before: float | None
    after: float | None
    change: float | None
    low: float | None
    high: float | None
    significant: bool
    better: bool | None
    gates: bool

    def worsening(self) -> float:
        """How much worse it is, of what it was; of shares, in points. 0 when it is no worse or that may be chance."""
        if not self.significant or self.better is not False or self.change is None:
            return 0.0
        if self.unit == "share":
            return abs(self.change)
        return abs(self.change / self.before) if self.before else math.inf


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two runs. warnings: why the comparison may mean little."""

    before: str
    after: str
    warnings: tuple[str, ...]
    paired: bool
    differences: tuple[Difference, ...]

    def worse(self, tolerance: float) -> list[Difference]:
        """The significant worsenings above a tolerance (0.02: 2 % of the figure, two points of a share)."""
        return [difference for difference in self.differences if difference.gates and difference.worsening() > tolerance]


def compare(before: tuple[Result, Sequence[RequestRecord]], after: tuple[Result, Sequence[RequestRecord]]) -> Comparison:
    """Compares under the objective of the first. Raises BadInput when either has no requests."""
    (result_before, records_before), (result_after, records_after) = before, after
    for result, records in (before, after):
        if not records:
            raise BadInput(f"{result.name} has no requests to compare")
    result_after = judged_by(result_after, records_after, result_before.objective)
    paired = _is_paired(result_before, result_after, records_before, records_after)
    sample_before = Sample(records_before, result_before, seed=SEED)
    # Equal weights for equal requests make the difference that of pairs.
    sample_after = Sample(records_after, result_after, seed=SEED if paired else SEED + 1)
    all_before = {figure.name: figure for figure in figures_of(sample_before)}
    all_after = {figure.name: figure for figure in figures_of(sample_after)}
    names = list(dict.fromkeys([*all_before, *all_after]))
    confidence = 1 - (1 - CONFIDENCE) / max(len(all_before.keys() & all_after.keys()), 1)
    return Comparison(
        before=result_before.name,
        after=result_after.name,
        warnings=tuple(_warnings(result_before, result_after)),
        paired=paired,
        differences=tuple(_difference(all_before.get(name), all_after.get(name), confidence) for name in names),
    )


def _is_paired(before: Result, after: Result, records_before: Sequence[RequestRecord], records_after: Sequence[RequestRecord]) -> bool:
    return bool(before.schedule.digest) and before.schedule.digest == after.schedule.digest and len(records_before) == len(records_after)


def _warnings(before: Result, after: Result) -> list[str]:
    found = []
    if not before.schedule.digest or not after.schedule.digest:
        found.append("one schedule is not known: the two may have been asked for different things")
    elif before.schedule.digest != after.schedule.digest:
        found.append(
            f"the schedules differ ({before.schedule.digest[:12]} and {after.schedule.digest[:12]}): "
            "a difference may be theirs, not the servers'"
        )
    for result in (before, after):
        found += [f"{result.name} is invalid: {problem}" for problem in result.verdict.problems]
    return found


def _difference(before: Figure | None, after: Figure | None, strict: float) -> Difference:
    """strict: the confidence that makes a difference significant."""
    figure = before or after
    assert figure is not None
    change, interval, is_certain = None, None, False
    if before is not None and after is not None:
        change = after.value - before.value
        interval, is_certain = _certainty(before, after, strict)
    is_better = None if not change or figure.more_is_better is None else (change > 0) == figure.more_is_better
    return Difference(
        name=figure.name,
        unit=figure.unit,
        before=before.value if before else None,
        after=after.value if after else None,
        change=change,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        significant=is_certain,
        better=is_better,
        gates=figure.gates,
    )


def _certainty(before: Figure, after: Figure, strict: float) -> tuple[tuple[float, float] | None, bool]:
    """The change's 95 % interval, and whether the change is more than chance."""
    if before.counts is not None and after.counts is not None:
        return newcombe_interval(before.counts, after.counts), _excludes_zero(newcombe_interval(before.counts, after.counts, strict))
    if before.draws is None or after.draws is None:
        return None, False
    draws = after.draws - before.draws
    if np.isnan(draws).all():
        return None, False
    # By the spread of the resamples, since hardly any of them lie at the ends of so wide an interval.
    reach = NormalDist().inv_cdf(0.5 + strict / 2) * float(np.nanstd(draws))
    is_certain = abs(after.value - before.value) > reach
    low, high = np.nanpercentile(draws, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]).tolist()
    return (low, high), is_certain and _excludes_zero((low, high))


def _excludes_zero(interval: tuple[float, float]) -> bool:
    return interval[0] > 0 or interval[1] < 0
