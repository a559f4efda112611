"""Stacks of stages around a percentile, counted by hand; small stages are joined."""

import pytest

from loadtest.attribution import e2e_stages, ttft_stages
from loadtest.records import Outcome, RequestRecord
from loadtest.report.stacks import rows, stacks


def record(index: int, ttft_s: float, **stages: float) -> RequestRecord:
    return RequestRecord(index=index, at_s=0.0, outcome=Outcome.COMPLETED, first_token_s=ttft_s, finished_s=ttft_s, stages=stages)


def test_stacks_when_requests_differ_are_means_around_each_percentile() -> None:
    """101 requests of 1 to 101 s: around the median lie 49 to 53, the two neighbours on each side; the last has one on each side."""
    found = stacks([record(index, index + 1.0, prefill=index + 1.0) for index in range(101)], lambda record: record.ttft_s, ttft_stages)
    assert found == {"P50": {"prefill": 51.0}, "P90": {"prefill": 91.0}, "P99": {"prefill": 100.0}}


def test_stacks_when_one_stage_lies_beside_others_counts_it_for_the_first_token_alone() -> None:
    records = [record(0, 2.0, prefill=1.5, first_response_hop=0.5, decode=3.0)]
    assert stacks(records, lambda record: record.ttft_s, ttft_stages)["P50"] == {"prefill": 1.5, "first_response_hop": 0.5}
    assert stacks(records, lambda record: record.e2e_s, e2e_stages)["P50"] == {"prefill": 1.5, "decode": 3.0}


def test_stacks_when_no_request_has_stages_are_empty() -> None:
    assert stacks([record(0, 1.0)], lambda record: record.ttft_s, ttft_stages) == {}


def test_rows_when_stages_are_small_in_every_stack_joins_them() -> None:
    found = rows({"P50": {"route": 0.001, "to_decode": 0.002, "prefill": 1.0}, "P99": {"route": 0.001, "to_decode": 0.1, "prefill": 1.0}})
    assert [(row.name, row.stage) for row in found] == [
        ("to decode", "to_decode"),
        ("prefill", "prefill"),
        ("1 other, each below 1 %", None),
    ]
    assert found[-1].seconds == pytest.approx({"P50": 0.001, "P99": 0.001})
