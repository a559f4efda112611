"""Figures of a run, each against a case computed by hand."""

import math
from typing import Any

import pytest

from loadtest.attribution import causes, stage_order
from loadtest.metrics import Distribution
from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.summary import Summary, Tenant, summarize

OBJECTIVE = Objective(ttft_s=1.0, tpot_s=0.1)


def record(index: int, **fields: Any) -> RequestRecord:
    """One that completed well: first token after 0.5 s, 11 tokens at 50 ms, its end with its last token."""
    at_s = fields.setdefault("at_s", float(index))
    values: dict[str, Any] = {
        "sent_s": at_s,
        "input_tokens": 100,
        "output_tokens": 11,
        "outcome": Outcome.COMPLETED,
        "first_token_s": at_s + 0.5,
        "last_token_s": at_s + 1.0,
        "finished_s": at_s + 1.0,
    }
    return RequestRecord(index=index, **values | fields)


def summary(*records: RequestRecord, objective: Objective = OBJECTIVE, duration_s: float = 10.0, **options: int) -> Summary:
    return summarize(records, objective=objective, duration_s=duration_s, **options)


def test_summarize_when_requests_end_in_every_way_counts_each_and_divides_by_all_that_were_offered() -> None:
    found = summary(
        record(0),
        record(1, first_token_s=2.5, last_token_s=3.0, finished_s=3.0),  # first token after 1.5 s
        record(2, first_token_s=2.5, last_token_s=4.5, finished_s=24.5),  # 200 ms a token
        RequestRecord(index=3, at_s=3.0, sent_s=3.0, outcome=Outcome.REFUSED, finished_s=3.1),
        RequestRecord(index=4, at_s=4.0, sent_s=4.0, outcome=Outcome.FAILED, error="RuntimeError", output_tokens=7, finished_s=4.1),
        RequestRecord(index=5, at_s=5.0),
        record(6),
        record(7),
    )
    assert (found.offered, found.sent, found.completed, found.refused, found.failed, found.good) == (8, 7, 5, 1, 1, 3)
    assert found.attainment == 3 / 8
    assert (found.attainment_low, found.attainment_high) == pytest.approx((0.1368, 0.6943), abs=5e-5)
    assert (found.within_ttft, found.within_tpot) == (4 / 8, 4 / 8)
    assert (found.offered_rate, found.goodput, found.span_s, found.achieved_rate) == (0.8, 0.3, 24.5, 5 / 24.5)
    assert found.output_tokens == 5 * 11 + 7


def test_summarize_when_a_request_was_sent_late_counts_from_the_intended_time() -> None:
    found = summary(record(0, sent_s=0.2, first_token_s=0.5))
    assert found.ttft_ms == Distribution(mean=500.0, p50=500.0, p90=500.0, p99=500.0)
    assert found.ttft_as_sent_ms is not None and found.ttft_as_sent_ms.p50 == pytest.approx(300.0)
    assert found.lag_ms is not None and found.lag_ms.p99 == pytest.approx(200.0)
    assert found.e2e_ms is not None and found.e2e_ms.mean == pytest.approx(1000.0)


def test_summarize_when_gaps_are_uneven_keeps_tpot_per_request_and_itl_per_gap() -> None:
    found = summary(
        record(0, output_tokens=4, first_token_s=0.0, last_token_s=0.6, gaps_s=[0.1, 0.1, 0.4]),
        record(1, output_tokens=2, first_token_s=1.0, last_token_s=1.1, gaps_s=[0.1]),
        record(2, output_tokens=1, first_token_s=2.0, last_token_s=2.0),  # nothing comes after its only token
    )
    assert found.tpot_ms is not None and found.tpot_ms.mean == pytest.approx((200 + 100) / 2)
    assert found.itl_ms is not None and found.itl_ms.mean == pytest.approx((100 + 100 + 400 + 100) / 4)
    assert found.itl_ms.p50 == pytest.approx(100)


def test_summarize_when_nothing_completed_describes_nothing() -> None:
    found = summary(RequestRecord(index=0, at_s=0.0), duration_s=0.0)
    assert (found.ttft_ms, found.tpot_ms, found.itl_ms, found.e2e_ms, found.lag_ms, found.reuse) == (None,) * 6
    assert (found.offered_rate, found.goodput, found.achieved_rate, found.attainment) == (None, None, None, 0.0)
    assert summary().attainment == 0.0


def test_is_good_when_the_objective_grows_with_the_prompt_uses_this_prompts() -> None:
    objective = Objective(ttft_s=0.2, ttft_per_token_s=0.003, tpot_s=0.1)
    assert summary(record(0, input_tokens=100), objective=objective).good == 1  # 0.5 s of 0.5
    assert summary(record(0, input_tokens=99), objective=objective).good == 0


def test_reuse_when_requests_differ_in_length_is_of_tokens_and_the_request_mean_of_requests() -> None:
    found = summary(
        # What decode has too, of a prompt that prefill computes, is not moved; it saves no computing.
        record(0, input_tokens=1000, prefill_cached_tokens=400, decode_cached_tokens=300, prefill_worker_id="p", decode_worker_id="d"),
        record(1, input_tokens=100, decode_cached_tokens=50, decode_worker_id="d"),
        record(2, input_tokens=900),  # does not say
    )
    assert found.reuse == pytest.approx(450 / 1100)
    assert (found.prefix_reuse, found.decode_reuse) == pytest.approx((400 / 1100, 50 / 1100))
    assert found.reuse_request_mean == pytest.approx((0.4 + 0.5) / 2)


def test_reuse_when_a_server_does_not_say_where_hits_lay_is_not_split() -> None:
    found = summary(record(0, cached_tokens=50))
    assert (found.prefix_reuse, found.decode_reuse, found.reuse) == (None, None, 0.5)


def test_tokens_per_worker_when_answers_end_after_the_schedule_counts_until_the_last() -> None:
    found = summary(record(0), record(1, at_s=19.0), num_workers=4)
    assert found.tokens_per_worker_s == pytest.approx(22 / (4 * 20.0))
    assert summary(record(0)).tokens_per_worker_s is None


def test_span_when_the_last_answer_ends_before_the_last_arrival_is_that_of_the_schedule() -> None:
    found = summary(record(0), RequestRecord(index=1, at_s=10.0), num_workers=1)
    assert (found.span_s, found.achieved_rate, found.tokens_per_worker_s) == (10.0, 0.1, 1.1)


def test_tenants_when_one_fares_worse_shows_in_attainment_and_jain() -> None:
    late = {"first_token_s": 9.0, "last_token_s": 9.5}
    found = summary(record(0, tenant="a"), record(1, tenant="a"), record(2, tenant="b"), record(3, tenant="b", **late))
    assert found.tenants == {"a": Tenant(offered=2, good=2, attainment=1.0), "b": Tenant(offered=2, good=1, attainment=0.5)}
    assert found.jain == pytest.approx(1.5**2 / (2 * 1.25))
    assert summary(record(0)).tenants == {} and summary(record(0)).jain is None


def test_kv_bytes_when_expected_bytes_are_given_keeps_both() -> None:
    found = summary(record(0, kv_bytes=300), record(1, kv_bytes=200), kv_bytes_expected=512)
    assert (found.kv_bytes, found.kv_bytes_expected) == (500, 512)


def test_residual_when_stages_leave_time_out_is_what_they_leave() -> None:
    exact = record(0, stages={"prefill": 0.5, "decode": 0.5})
    off = record(1, stages={"prefill": 0.5, "decode": 0.45})
    close = record(2, stages={"prefill": 0.5, "decode": 0.495})  # half a per cent
    found = summary(exact, off, close, record(3))
    assert found.residual_ms is not None and found.residual_ms.mean == pytest.approx((0 + 50 + 5) / 3)
    assert found.residual_within == pytest.approx(2 / 3)
    assert list(found.stages_ms) == ["prefill", "decode"]
    assert found.stages_ms["decode"].mean == pytest.approx((500 + 450 + 495) / 3)


def test_residual_when_a_stage_lies_beside_others_does_not_count_it_twice() -> None:
    """The first token is delivered while decode goes on."""
    found = summary(record(0, stages={"prefill": 0.4, "first_response_hop": 0.1, "decode": 0.6}))
    assert found.residual_ms is not None and math.isclose(found.residual_ms.mean, 0.0, abs_tol=1e-9)


def test_stage_order_when_some_stages_are_unknown_keeps_theirs_after_the_known() -> None:
    records = [record(0, stages={"warp": 0.1, "decode": 0.1}), record(1, stages={"prefill": 0.1, "weft": 0.2})]
    assert stage_order(records) == ["prefill", "decode", "warp", "weft"]


def test_causes_when_first_tokens_are_late_names_the_stage_that_grew_not_the_largest() -> None:
    usual = [record(index, stages={"prefill_queue": 0.01, "prefill": 0.4, "decode": 0.5}) for index in range(3)]
    late = {"first_token_s": 9.0, "last_token_s": 9.5, "finished_s": 9.5, "at_s": 7.0}
    queued = record(3, **late, stages={"prefill_queue": 0.45, "prefill": 0.6, "decode": 0.5})
    slow = record(4, last_token_s=6.5, stages={"prefill_queue": 0.01, "prefill": 0.4, "decode": 2.0})
    untold = record(5, **late)
    refused = RequestRecord(index=6, at_s=6.0, sent_s=6.0, outcome=Outcome.REFUSED)
    found = summary(*usual, queued, record(7, **late, stages=queued.stages), slow, untold, refused)
    assert found.broke == {"prefill_queue": 2, "decode": 1, "late first token": 1, "refused": 1}
    assert found.breaker == "prefill_queue"
    assert summary(*usual).breaker is None


def test_causes_when_first_token_and_tpot_both_fail_blames_what_came_first() -> None:
    both = record(0, first_token_s=3.0, last_token_s=9.0, stages={"prefill": 3.0, "decode": 6.0})
    assert causes([both], OBJECTIVE) == {"prefill": 1}
