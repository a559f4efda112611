"""A workload in figures: how much, how fast, how long, and how much of it caches could save."""

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from loadtest.ceilings import infinite_reuse
from loadtest.metrics import Distribution, distribution
from loadtest.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSummary:
    """
    span_s                   from the first to the last request, later turns when they would come at the earliest
    rate                     requests a second: gaps between requests ÷ span; None when all come at once
    gap_cv                   standard deviation ÷ mean of those gaps
    num_sessions             that are named; a request of none does not count
    num_tenants              likewise
    infinite_cache_reuse     input tokens that a cache that never evicts would save ÷ all; None of texts, which have no blocks
    digest                   of the schedule
    """

    source: str
    block_size: int
    num_requests: int
    span_s: float
    rate: float | None
    gap_cv: float | None
    input_tokens: Distribution
    output_tokens: Distribution
    num_sessions: int
    num_tenants: int
    infinite_cache_reuse: float | None
    digest: str


def summarize(schedule: Schedule) -> WorkloadSummary:
    """Of a schedule that has requests."""
    times_s = sorted(schedule.earliest_s)
    span_s = times_s[-1] - times_s[0]
    gaps = np.diff(times_s)
    inputs = distribution([request.input_tokens for request in schedule.requests])
    outputs = distribution([request.output_tokens for request in schedule.requests])
    assert inputs is not None and outputs is not None
    return WorkloadSummary(
        source=schedule.source,
        block_size=schedule.block_size,
        num_requests=len(schedule),
        span_s=span_s,
        rate=(len(schedule) - 1) / span_s if span_s else None,
        gap_cv=float(gaps.std() / gaps.mean()) if span_s else None,
        input_tokens=inputs,
        output_tokens=outputs,
        num_sessions=len({request.session for request in schedule.requests} - {""}),
        num_tenants=len({request.tenant for request in schedule.requests} - {""}),
        infinite_cache_reuse=None if any(request.text for request in schedule.requests) else infinite_reuse(schedule),
        digest=schedule.digest,
    )


def table(summary: WorkloadSummary) -> Table:
    """For a terminal."""
    rows = Table(title=summary.source, title_justify="left", show_header=False)
    rows.add_column()
    rows.add_column(overflow="fold")
    rows.add_row("requests", f"{summary.num_requests:,}")
    rows.add_row("span", f"{summary.span_s:,.1f} s")
    if summary.rate is not None and summary.gap_cv is not None:
        rows.add_row("rate", f"{summary.rate:.3g} requests/s")
        rows.add_row("coefficient of variation of the gaps", f"{summary.gap_cv:.2f}")
    for label, found in (("input", summary.input_tokens), ("output", summary.output_tokens)):
        rows.add_row(
            f"{label} tokens, mean / p50 / p90 / p99", f"{found.mean:,.0f} / {found.p50:,.0f} / {found.p90:,.0f} / {found.p99:,.0f}"
        )
    rows.add_row("sessions", f"{summary.num_sessions:,}")
    rows.add_row("tenants", f"{summary.num_tenants:,}")
    reuse = summary.infinite_cache_reuse
    rows.add_row(
        "reusable input, infinite cache", "not known of texts" if reuse is None else f"{reuse:.1%}, blocks of {summary.block_size} tokens"
    )
    rows.add_row("digest", summary.digest)
    return rows
