import numpy as np
import pytest

from loadtest.files import BadInput
from loadtest.schedule import PlannedRequest, Schedule
from loadtest.traces.arrivals import Arrivals, arrival_times, restamped


def _schedule(*times_s: float, followers: bool = False) -> Schedule:
    requests = [PlannedRequest(at_s=at_s, input_tokens=1, output_tokens=1, block_runs=((0, 1),)) for at_s in times_s]
    if followers:
        requests.append(PlannedRequest(at_s=0.0, input_tokens=1, output_tokens=1, block_runs=((0, 1),), after=0, think_s=5.0))
    return Schedule(block_size=1, requests=tuple(requests), source="here")


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrival_times_have_the_rate_and_the_variation_of_their_burstiness(burstiness: float) -> None:
    gaps = np.diff(arrival_times(40_000, rate=5.0, burstiness=burstiness, seed=1))
    # Both estimates are off by less than 5 % with these seeds; their standard errors are about 1 % and 2 %.
    assert 1 / gaps.mean() == pytest.approx(5.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_arrival_times_depend_on_the_seed_and_begin_alike_however_many() -> None:
    assert arrival_times(50, rate=2.0, seed=3)[:20] == arrival_times(20, rate=2.0, seed=3)
    assert arrival_times(20, rate=2.0, seed=3) != arrival_times(20, rate=2.0, seed=4)


def test_restamped_draws_times_for_first_turns_alone() -> None:
    schedule = restamped(_schedule(0.0, 1.0, 4.0, followers=True), Arrivals.POISSON, rate=2.0, seed=7)
    assert [request.at_s for request in schedule.requests] == [*arrival_times(3, rate=2.0, seed=7), 0.0]
    assert (schedule.requests[3].after, schedule.requests[3].think_s) == (0, 5.0)
    bursts = restamped(_schedule(0.0, 1.0, 4.0), Arrivals.GAMMA, rate=2.0, burstiness=0.5, seed=7)
    assert [request.at_s for request in bursts.requests] == arrival_times(3, rate=2.0, burstiness=0.5, seed=7)


def test_restamped_when_no_rate_is_given_keeps_the_recorded_one() -> None:
    schedule = restamped(_schedule(10.0, 11.0, 14.0), Arrivals.POISSON, seed=7)
    assert [request.at_s for request in schedule.requests] == arrival_times(3, rate=0.5, seed=7)


def test_restamped_when_the_pattern_is_kept_only_changes_its_speed() -> None:
    schedule = restamped(_schedule(0.0, 1.0, 4.0, followers=True), Arrivals.TRACE, rate=1.0, seed=0)
    assert [request.at_s for request in schedule.requests] == [0.0, 0.5, 2.0, 0.0]
    assert schedule.requests[3].think_s == 5.0


@pytest.mark.parametrize(("arrivals", "rate"), [(Arrivals.POISSON, None), (Arrivals.TRACE, 2.0)])
def test_restamped_when_all_come_at_once_needs_a_rate(arrivals: Arrivals, rate: float | None) -> None:
    with pytest.raises(BadInput, match="no rate"):
        restamped(_schedule(3.0, 3.0), arrivals, rate=rate, seed=0)
    assert restamped(_schedule(3.0, 3.0), Arrivals.POISSON, rate=2.0, seed=0).requests[0].at_s > 0
