"""Who comes in: places, predicted lateness, and what those who are refused are told."""

import dataclasses
import random

import pytest

from services.core.errors import Overloaded, QueueFull
from services.router.admission import MAX_RETRY_S, MIN_RETRY_S, Admission
from services.router.route import Route, RouteRequest
from tests.unit.router.fleets import Load, make_fleet, route


def predicted(ttft_s: float, *, tpot_s: float = 0.01, output_tokens: float = 100) -> Route:
    chosen = route(make_fleet(), RouteRequest(prompt_tokens=100))
    return dataclasses.replace(chosen, predicted_ttft_s=ttft_s, predicted_tpot_s=tpot_s, predicted_output_tokens=output_tokens)


def busy(admission: Admission) -> Admission:
    """With two requests in flight."""
    admission.enter()
    admission.enter()
    return admission


def test_enter_when_all_places_are_taken_raises_queue_full_and_a_freed_place_can_be_had() -> None:
    admission = Admission(max_in_flight=2)
    with admission.enter():
        with admission.enter():
            with pytest.raises(QueueFull, match="2 requests are in flight") as caught:
                admission.enter()
            assert MIN_RETRY_S <= caught.value.retry_after_s <= MAX_RETRY_S
        assert admission.num_in_flight == 1
        with admission.enter():
            pass
    assert admission.num_in_flight == 0


def test_place_when_its_request_fails_is_given_back() -> None:
    admission = Admission(max_in_flight=1)
    with pytest.raises(ValueError, match="anything"), admission.enter():
        raise ValueError("anything")
    assert admission.num_in_flight == 0


def test_place_when_left_twice_is_given_back_once() -> None:
    admission = Admission(max_in_flight=2)
    other = admission.enter()
    place = admission.enter()
    for _ in range(2):
        with place:
            pass
    assert admission.num_in_flight == 1
    with other:
        pass


@pytest.mark.parametrize(
    ("slo_s", "remaining_s", "limit_s"), [(None, None, None), (2.0, None, 2.0), (None, 3.0, 3.0), (2.0, 3.0, 2.0), (2.0, 1.0, 1.0)]
)
def test_limit_is_the_nearer_of_objective_and_deadline(slo_s: float | None, remaining_s: float | None, limit_s: float | None) -> None:
    admission = busy(Admission(max_in_flight=10, ttft_slo_s=slo_s))
    assert admission.ttft_limit_s(remaining_s) == limit_s
    if limit_s is None:
        admission.check(predicted(1e6), remaining_s=remaining_s)
        return
    admission.check(predicted(limit_s), remaining_s=remaining_s)
    with pytest.raises(Overloaded, match="the first token would come after"):
        admission.check(predicted(limit_s + 0.01), remaining_s=remaining_s)


def test_check_when_shed_tells_the_time_until_the_queues_will_have_drained() -> None:
    admission = busy(Admission(max_in_flight=10, ttft_slo_s=1.0))
    for ttft_s, retry_after_s in ((4.0, 3.0), (1.001, MIN_RETRY_S), (1e6, MAX_RETRY_S)):
        with pytest.raises(Overloaded) as caught:
            admission.check(predicted(ttft_s))
        assert caught.value.retry_after_s == pytest.approx(retry_after_s)


def test_check_of_the_only_request_lets_it_through_so_that_predictions_can_be_corrected() -> None:
    admission = Admission(max_in_flight=10, ttft_slo_s=1.0)
    with admission.enter():
        admission.check(predicted(100.0))
        with admission.enter(), pytest.raises(Overloaded):
            admission.check(predicted(100.0))


def test_check_when_first_tokens_come_later_than_predicted_keeps_so_much_more_distance() -> None:
    admission = busy(Admission(max_in_flight=10, ttft_slo_s=1.0))
    rng = random.Random(1)
    for _ in range(2000):
        admission.note_first_token(predicted(0.5), 0.5 + rng.uniform(-0.2, 0.2))
    # Nine of ten came no later than 0.16 s behind their prediction.
    admission.check(predicted(0.75))
    with pytest.raises(Overloaded, match="the limit is 1 s"):
        admission.check(predicted(0.95))
    assert admission.ttft_limit_s(None) == pytest.approx(0.84, abs=0.06)
    for _ in range(200):
        admission.note_first_token(predicted(0.5), 0.4)
    assert admission.ttft_limit_s(None) == 1.0


def test_check_when_predictions_are_worthless_still_lets_in_what_is_far_below_the_limit() -> None:
    admission = busy(Admission(max_in_flight=10, ttft_slo_s=1.0))
    for _ in range(500):
        admission.note_first_token(predicted(0.4), 60.0)
    admission.check(predicted(0.45))
    with pytest.raises(Overloaded):
        admission.check(predicted(0.55))


def test_queue_full_when_requests_are_long_tells_clients_to_come_back_later() -> None:
    retry_after_s = []
    for output_tokens in (10, 1000):
        admission = Admission(max_in_flight=1)
        admission.enter()
        for _ in range(200):
            admission.check(predicted(0.1, tpot_s=0.04, output_tokens=output_tokens))
        with pytest.raises(QueueFull) as caught:
            admission.enter()
        retry_after_s.append(caught.value.retry_after_s)
    assert retry_after_s == [pytest.approx(0.125, rel=0.01), pytest.approx(10.0, rel=0.01)]


def test_admission_with_the_policy_sheds_at_overload_and_admits_again_when_the_queues_are_short() -> None:
    fleet = make_fleet(prefill=1, decode=1, num_running=60)
    admission = busy(Admission(max_in_flight=100, ttft_slo_s=0.5))
    request = RouteRequest(prompt_tokens=2048, max_output_tokens=10, ttft_limit_s=admission.ttft_limit_s(None))
    admitted = 0
    for _ in range(100):
        chosen = route(fleet, request)
        try:
            admission.check(chosen)
        except Overloaded as error:
            retry_after_s = error.retry_after_s
            break
        fleet.dispatched(chosen, 0.0)
        admitted += 1
    assert 2 <= admitted <= 20
    fleet.report("decode-0", Load(num_running=10), 1.0)
    fleet.report("prefill-0", Load(), 1.0)
    admission.check(route(fleet, request, now_s=1.0))
    assert retry_after_s < 1.0


def test_place_when_it_was_given_up_early_is_given_back_once() -> None:
    admission = Admission(max_in_flight=1)
    with admission.enter() as place:
        place.leave()
        with admission.enter():
            assert admission.num_in_flight == 1
    assert admission.num_in_flight == 0
