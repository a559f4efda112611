"""Growing backlogs against queues whose law is known: Poisson arrivals, exponential service, four servers."""

import heapq

import numpy as np
import pytest

from loadtest.records import Outcome, RequestRecord
from loadtest.stability import backlog


def queue(*, load: float, seed: int, requests: int = 1000, servers: int = 4) -> list[RequestRecord]:
    rng = np.random.default_rng(seed)
    arrivals_s = np.cumsum(rng.exponential(1 / (load * servers), requests))
    free_s = [0.0] * servers
    records = []
    for index, (at_s, service_s) in enumerate(zip(arrivals_s.tolist(), rng.exponential(1.0, requests).tolist(), strict=True)):
        finished_s = max(at_s, heapq.heappop(free_s)) + service_s
        heapq.heappush(free_s, finished_s)
        records.append(RequestRecord(index=index, at_s=at_s, sent_s=at_s, finished_s=finished_s, outcome=Outcome.COMPLETED))
    return records


def num_growing(load: float, *, runs: int = 40, requests: int = 1000) -> int:
    found = 0
    for seed in range(runs):
        records = queue(load=load, seed=seed, requests=requests)
        judged = backlog(records, duration_s=records[-1].at_s)
        found += judged is not None and judged.grows
    return found


@pytest.mark.parametrize("load", [0.5, 0.85])
def test_backlog_when_the_queue_is_below_capacity_hardly_ever_grows(load: float) -> None:
    assert num_growing(load) <= 1


def test_backlog_when_the_queue_is_long_but_steady_hardly_ever_grows() -> None:
    """At 95 % of capacity queues swing for as long as the run lasts. Of 100 runs 1 was called growing."""
    assert num_growing(0.95) <= 2


def test_backlog_when_the_queue_is_a_fifth_above_capacity_grows() -> None:
    assert num_growing(1.2) >= 34
    assert num_growing(1.05, requests=5000) >= 10


def test_backlog_when_nothing_ever_ends_grows_as_fast_as_requests_come() -> None:
    records = [RequestRecord(index=index, at_s=index / 10, sent_s=index / 10) for index in range(1000)]
    found = backlog(records, duration_s=100.0)
    assert found is not None and found.grows
    assert found.slope_per_s == pytest.approx(10.0, rel=1e-3)
    assert found.open_at_end == 1000
    assert found.open_mean == pytest.approx(10 * 62.5, rel=1e-2)  # halfway between a quarter and the end


def test_backlog_when_hardly_any_request_stays_is_certain_of_its_slope_and_does_not_grow() -> None:
    """Of 200 requests one never ends: half of what counts."""
    records = [
        RequestRecord(index=index, at_s=index / 100, sent_s=index / 100, finished_s=None if index % 200 == 0 else index / 100)
        for index in range(20000)
    ]
    found = backlog(records, duration_s=200.0)
    assert found is not None and found.t_statistic > 100
    assert found.slope_per_s == pytest.approx(0.5, rel=0.02)
    assert not found.grows


def test_backlog_when_requests_end_at_once_is_flat() -> None:
    records = [RequestRecord(index=index, at_s=index / 10, sent_s=index / 10, finished_s=index / 10 + 0.05) for index in range(1000)]
    found = backlog(records, duration_s=100.0)
    assert found is not None and not found.grows
    assert found.open_mean == pytest.approx(0.5, rel=1e-2)


def test_backlog_when_the_run_is_too_short_or_nothing_was_sent_does_not_say() -> None:
    assert backlog([RequestRecord(index=index, at_s=0.1 * index, sent_s=0.1 * index) for index in range(31)], duration_s=3.0) is None
    assert backlog([RequestRecord(index=index, at_s=0.1 * index) for index in range(100)], duration_s=10.0) is None
