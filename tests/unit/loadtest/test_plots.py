"""What plots show, against numbers counted by hand."""

from typing import Any

import numpy as np
import pytest

from loadtest.ceilings import Ceilings
from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.report.plots import caches, latency, over_time, stages
from loadtest.report.plots.attainment_by_rate import attainment_by_rate, probes_of
from tests.unit.loadtest.made_results import made_records, made_result


def record(at_s: float, *, ttft_s: float = 0.1, lasts_s: float = 1.0, outcome: Outcome = Outcome.COMPLETED) -> RequestRecord:
    return RequestRecord(index=0, at_s=at_s, sent_s=at_s, outcome=outcome, first_token_s=at_s + ttft_s, finished_s=at_s + lasts_s)


RECORDS = [
    record(0.0),
    record(0.5, ttft_s=9.0, lasts_s=9.5),
    record(9.0, outcome=Outcome.REFUSED, lasts_s=0.0),
    record(20.2, lasts_s=39.8),  # the run is 60 s long: in stretches of one second
]


def values(plot: Any, name: str) -> dict[float, float]:
    """A line's values, where they are anything but nothing."""
    [trace] = [trace for trace in plot.data if trace.name == name]
    return {x: y for x, y in zip(trace.x, trace.y, strict=True) if y}


def test_stretches_when_a_run_has_a_length_are_of_a_round_one_and_cover_it() -> None:
    assert over_time.stretches(RECORDS).tolist() == list(range(62))
    assert np.diff(over_time.stretches([record(0.0, lasts_s=0.13)]))[0] == pytest.approx(0.005)


def test_rates_when_requests_come_and_end_are_per_second_in_their_own_stretch() -> None:
    plot = over_time.rates(RECORDS, [])
    assert values(plot, "offered") == {0.5: 2, 9.5: 1, 20.5: 1}
    assert values(plot, "completed") == {1.5: 1, 10.5: 1, 60.5: 1}
    assert values(plot, "refused") == {9.5: 1}


def test_attainment_when_requests_are_late_counts_them_where_they_were_due() -> None:
    plot = over_time.attainment(RECORDS, Objective(ttft_s=1.0), [])
    [trace] = plot.data
    shares = dict(zip(trace.x, trace.y, strict=True))
    assert (shares[0.5], shares[9.5], shares[20.5]) == (0.5, 0.0, 1.0)
    assert shares[30.5] is None  # nobody was due


def test_open_requests_when_some_run_long_are_those_between_arrival_and_end() -> None:
    [trace] = over_time.open_requests([*RECORDS, RequestRecord(index=9, at_s=3.0)], []).data
    opened = dict(zip(trace.x, trace.y, strict=True))
    assert (opened[0], opened[1], opened[5], opened[15], opened[30], opened[61]) == (1, 1, 1, 0, 1, 0)


def test_ecdf_when_four_values_are_given_climbs_by_quarters() -> None:
    [trace] = latency.ecdf({"x": np.array([40.0, 10, 30, 20])}, name="x", objective_ms=None).data
    assert list(zip(trace.x, trace.y, strict=True)) == [(10, 0.25), (20, 0.5), (30, 0.75), (40, 1.0)]


def test_ecdf_when_there_are_many_values_keeps_the_slowest_hundred() -> None:
    [trace] = latency.ecdf({"x": np.arange(100_000, dtype=np.float64)}, name="x", objective_ms=None).data
    assert len(trace.x) <= latency.MAX_POINTS + 100
    assert list(trace.x[-100:]) == list(range(99_900, 100_000))


def test_histogram_when_all_values_are_equal_still_has_a_bar_for_them() -> None:
    [bars] = latency.histogram(np.full(7, 5.0), name="x", objective_ms=None).data
    assert sum(bars.y) == 7 and max(bars.y) == 7


def test_objective_when_far_beyond_all_values_is_not_drawn() -> None:
    assert len(latency.ecdf({"x": np.array([1.0, 2.0])}, name="x", objective_ms=9.0).layout.shapes) == 1
    assert not latency.ecdf({"x": np.array([1.0, 2.0])}, name="x", objective_ms=11.0).layout.shapes


def test_attainment_by_rate_when_runs_and_searches_are_mixed_is_in_order_of_the_rate() -> None:
    records = made_records(requests=60)
    probes = probes_of([made_result(records), made_result(records, extra={})])
    assert [probe.rate for probe in probes] == sorted(probe.rate for probe in probes)
    assert [probe.n for probe in probes if probe.rate not in (5.0, 10.0, 20.0)] == [60]
    [trace] = attainment_by_rate(probes[:1]).data
    assert (trace.y[0], trace.error_y.array[0], trace.error_y.arrayminus[0]) == pytest.approx((1.0, 0.0, 0.02))


def test_reuse_when_hits_are_not_split_is_one_bar_beside_the_ceilings() -> None:
    records = made_records(requests=60)
    for made in records:
        made.prefill_worker_id = made.decode_worker_id = ""
    summary = made_result(records).summary
    plot = caches.reuse(summary, Ceilings(infinite=0.9, one_pool=0.8, round_robin=0.2))
    assert [(trace.name, list(trace.x)) for trace in plot.data] == [
        ("any cache", [summary.reuse]),
        ("what the schedule permits", [0.9, 0.8, 0.2]),
    ]


def test_broke_when_counts_are_given_labels_each() -> None:
    [bars] = stages.broke({"prefill_queue": 7, "refused": 2}).data
    assert (list(bars.x), list(bars.y), list(bars.text)) == ([7, 2], ["prefill queue", "refused"], ["7", "2"])
