"""Whether a run's figures may be believed: what makes them worthless is said before any of them."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from loadtest.attribution import e2e_stages_s, is_accounted_for
from loadtest.records import Objective, Outcome, RequestRecord

MAX_LAG_SHARE = 0.01  # of what the first token may take, at the 99th percentile
MIN_ACCOUNTED_FOR = 0.99


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the figures may be believed, and why not."""

    valid: bool
    problems: tuple[str, ...] = ()


def verdict(records: Sequence[RequestRecord], objective: Objective, *, max_cached_tokens: Mapping[int, int] | None = None) -> Verdict:
    """Judges a run by its records.

    max_cached_tokens   by a request's index, how many of its prompt's tokens could have been cached at all under this schedule
    """
    found = (
        _nothing_offered(records),
        _unsent(records),
        _late_sending(records, objective),
        _unaccounted_time(records),
        _impossible_hits(records, max_cached_tokens or {}),
    )
    problems = tuple(problem for problem in found if problem)
    return Verdict(valid=not problems, problems=problems)


def _nothing_offered(records: Sequence[RequestRecord]) -> str:
    return "" if records else "the schedule has no requests"


def _unsent(records: Sequence[RequestRecord]) -> str:
    unsent = sum(record.outcome is Outcome.UNSENT for record in records)
    return f"{unsent:,} of {len(records):,} requests were never sent: the offered load was not the schedule's" if unsent else ""


def _late_sending(records: Sequence[RequestRecord], objective: Objective) -> str:
    """The lag of each against its own limit, since limits may grow with the prompt."""
    sent = [(record.lag_s, objective.first_token_within_s(record.input_tokens)) for record in records if record.lag_s is not None]
    if not sent:
        return ""
    lags_s, limits_s = np.array(sent).T
    # An objective of nothing (all of it per token, and a prompt without any) permits no lag, and no division either.
    share = float(np.percentile(lags_s / np.maximum(limits_s, 1e-9), 99))
    if share <= MAX_LAG_SHARE:
        return ""
    return (
        f"the sender was late: P99 send lag {np.percentile(lags_s, 99) * 1e3:,.1f} ms is {share:.1%} of the TTFT objective "
        f"({MAX_LAG_SHARE:.0%} allowed); use more sender processes or a lower rate"
    )


def _unaccounted_time(records: Sequence[RequestRecord]) -> str:
    staged = [record for record in records if record.stages and record.e2e_s is not None]
    apart = [record for record in staged if not is_accounted_for(record)]
    if len(staged) - len(apart) >= MIN_ACCOUNTED_FOR * len(staged):
        return ""
    worst, residual_s = max(
        ((record, record.e2e_s - e2e_stages_s(record)) for record in apart if record.e2e_s is not None), key=lambda pair: abs(pair[1])
    )
    return (
        f"stages do not add up to the client's end-to-end time: {len(apart):,} of {len(staged):,} requests are off by more than 1 % and "
        f"2 ms (1 % of requests may be); worst: request {worst.index}, {residual_s * 1e3:+,.1f} ms of {(worst.e2e_s or 0) * 1e3:,.1f} ms"
    )


def _impossible_hits(records: Sequence[RequestRecord], max_cached_tokens: Mapping[int, int]) -> str:
    """More tokens from a cache than any cache could hold: somebody was given another prompt's blocks."""
    impossible = [
        (record, limit)
        for record in records
        if (record.cached_tokens or 0) > (limit := max_cached_tokens.get(record.index, record.input_tokens))
    ]
    if not impossible:
        return ""
    record, limit = max(impossible, key=lambda pair: (pair[0].cached_tokens or 0) - pair[1])
    return (
        f"CORRECTNESS: {len(impossible):,} requests had more cached tokens than the schedule permits; worst: request {record.index}, "
        f"{record.cached_tokens:,} cached tokens, {limit:,} possible"
    )
