"""What makes a run invalid, each just inside and just outside its limit."""

from typing import Any

from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.verdict import Verdict, verdict

OBJECTIVE = Objective(ttft_s=1.0, tpot_s=0.1)


def record(index: int, **fields: Any) -> RequestRecord:
    values: dict[str, Any] = {"sent_s": 0.0, "input_tokens": 100, "outcome": Outcome.COMPLETED, "first_token_s": 0.5, "finished_s": 1.0}
    return RequestRecord(index=index, at_s=0.0, **values | fields)


def judged(*records: RequestRecord, **options: Any) -> Verdict:
    return verdict(records, OBJECTIVE, **options)


def test_verdict_when_all_was_sent_in_time_is_valid() -> None:
    assert judged(record(0, sent_s=0.0099), record(1)) == Verdict(valid=True)


def test_verdict_when_the_p99_lag_is_above_a_hundredth_of_the_objective_is_invalid_with_the_numbers() -> None:
    found = judged(*(record(index, sent_s=0.02) for index in range(100)))
    assert not found.valid
    assert "20.0 ms is 2.0% of the TTFT objective" in found.problems[0]
    # One of 200 is not in the 99th percentile.
    assert judged(record(0, sent_s=0.02), *(record(index) for index in range(1, 200))).valid


def test_verdict_when_the_objective_grows_with_the_prompt_holds_the_lag_against_this_prompts() -> None:
    objective = Objective(ttft_s=0.0, ttft_per_token_s=0.01)
    assert verdict([record(0, sent_s=0.02, input_tokens=1000)], objective).valid
    assert not verdict([record(0, sent_s=0.02, input_tokens=100)], objective).valid
    assert verdict([record(0, input_tokens=0)], objective).valid
    assert not verdict([record(0, sent_s=0.02, input_tokens=0)], objective).valid


def test_verdict_when_an_arrival_was_not_sent_is_invalid() -> None:
    found = judged(record(0), RequestRecord(index=1, at_s=1.0))
    assert found.problems == ("1 of 2 requests were never sent: the offered load was not the schedule's",)


def test_verdict_when_there_are_no_requests_is_invalid() -> None:
    assert judged().problems == ("the schedule has no requests",)


def test_verdict_when_stages_of_more_than_one_in_a_hundred_do_not_add_up_says_so_with_the_worst() -> None:
    fine = [record(index, stages={"prefill": 0.5, "decode": 0.495}) for index in range(99)]
    assert judged(*fine, record(99, stages={"prefill": 0.4})).valid
    found = judged(*fine, record(99, stages={"prefill": 0.4}), record(100, stages={"prefill": 1.1}))
    assert "2 of 101 requests are off" in found.problems[0]
    assert "worst: request 99, +600.0 ms of 1,000.0 ms" in found.problems[0]


def test_verdict_when_a_short_request_is_off_by_less_than_2_ms_is_valid() -> None:
    assert judged(record(0, first_token_s=0.005, finished_s=0.01, stages={"prefill": 0.0085})).valid
    assert not judged(record(0, first_token_s=0.005, finished_s=0.01, stages={"prefill": 0.0075})).valid


def test_verdict_when_more_is_cached_than_the_schedule_permits_is_a_correctness_bug() -> None:
    assert judged(record(0, cached_tokens=64), max_cached_tokens={0: 64}).valid
    found = judged(record(0, cached_tokens=64), record(1, cached_tokens=32), max_cached_tokens={0: 0, 1: 16})
    assert found.problems[0].startswith("CORRECTNESS: 2 requests had more cached tokens than the schedule permits; worst: request 0, 64")
    # Without a limit of its own a prompt cannot have more cached than it has.
    assert not judged(record(0, cached_tokens=101)).valid
