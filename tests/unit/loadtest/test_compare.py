"""Comparisons: a planted difference is found and named, chance is not."""

import math

import msgspec
import pytest

from loadtest.files import BadInput
from loadtest.records import Outcome
from loadtest.report.compare import Comparison, Difference, compare
from loadtest.report.judge import judged_by
from loadtest.verdict import Verdict
from tests.unit.loadtest.made_results import made_records, made_result


def compared(*, seed: int, slowdown: float = 1.0, digest: str = "6f1e" * 16, requests: int = 300) -> Comparison:
    before, after = made_records(seed=1, requests=requests), made_records(seed=seed, requests=requests, slowdown=slowdown)
    return compare((made_result(before, name="old"), before), (made_result(after, digest=digest, name="new"), after))


def named(comparison: Comparison, name: str) -> Difference:
    return next(difference for difference in comparison.differences if difference.name == name)


@pytest.mark.parametrize("digest", ["6f1e" * 16, "0000" * 16])
def test_compare_when_everything_takes_a_tenth_longer_finds_it(digest: str) -> None:
    found = compared(seed=2, slowdown=1.1, digest=digest)
    for name in ("TPOT mean", "TPOT p50", "E2E mean" if found.paired else "TPOT p90", "ITL p50", "stage transfer tail, mean"):
        difference = named(found, name)
        assert difference.significant and difference.better is False, name
    tpot = named(found, "TPOT mean")
    assert tpot.change is not None and tpot.before is not None and tpot.low is not None and tpot.high is not None
    assert tpot.change == pytest.approx(0.1 * tpot.before, rel=0.15)
    assert tpot.low < 0.1 * tpot.before < tpot.high
    assert {"TPOT mean", "TPOT p50"} <= {difference.name for difference in found.worse(0.05)}
    # A stage may grow while the whole does not: it explains, and does not fail anybody.
    assert not [difference for difference in found.worse(0.0) if difference.name.startswith("stage")]
    assert not [difference for difference in found.worse(0.15) if difference.name.startswith("TPOT mean")]


def test_compare_when_a_run_is_better_marks_it_so_and_worsens_nothing() -> None:
    found = compared(seed=2, slowdown=0.8)
    assert named(found, "TPOT mean").significant and named(found, "TPOT mean").better is True
    assert named(found, "attainment").better is True
    assert found.worse(0.0) == []


def test_compare_when_only_chance_differs_hardly_ever_finds_anything() -> None:
    """One comparison of twenty may; of these 16, more than 3 would have odds of 0.7 %."""
    found = [compared(seed=seed, requests=200) for seed in range(2, 18)]
    assert sum(any(difference.significant for difference in comparison.differences) for comparison in found) <= 3
    assert all(comparison.paired and not comparison.warnings for comparison in found)


def test_compare_when_the_schedules_differ_warns_and_does_not_pair() -> None:
    found = compared(seed=2, digest="abcd" * 16)
    assert not found.paired
    assert found.warnings == ("the schedules differ (6f1e6f1e6f1e and abcdabcdabcd): a difference may be theirs, not the servers'",)
    assert "one schedule is not known" in compared(seed=2, digest="").warnings[0]


def test_compare_when_a_run_is_compared_with_itself_differs_in_nothing() -> None:
    found = compared(seed=1)
    assert {difference.change for difference in found.differences} == {0.0}
    assert not any(difference.significant or difference.better is not None for difference in found.differences)


def test_compare_when_a_run_is_invalid_warns_with_the_problem() -> None:
    before, after = made_records(requests=100), made_records(seed=2, requests=100)
    after[3] = msgspec.structs.replace(after[3], outcome=Outcome.UNSENT, sent_s=None)
    found = compare((made_result(before), before), (made_result(after, name="new"), after))
    assert found.warnings == ("new is invalid: 1 of 100 requests were never sent: the offered load was not the schedule's",)


def test_compare_when_the_objectives_differ_judges_both_by_the_first() -> None:
    records = made_records(requests=100)
    before = made_result(records)
    after = judged_by(before, records, msgspec.structs.replace(before.objective, ttft_s=1e-6))
    assert after.summary.attainment == 0.0
    difference = named(compare((before, records), (after, records)), "attainment")
    assert difference.before == difference.after == before.summary.attainment


def test_judged_by_when_the_run_had_other_problems_keeps_them_and_judges_the_lag_anew() -> None:
    records = made_records(requests=100)
    result = made_result(records, verdict=Verdict(valid=False, problems=("wrong tokens",)))
    strict = judged_by(result, records, msgspec.structs.replace(result.objective, ttft_s=0.001))
    assert [problem[:19] for problem in strict.verdict.problems] == ["the sender was late", "wrong tokens"]
    again = judged_by(strict, records, result.objective)
    assert again.verdict == result.verdict
    assert again.summary == result.summary


def test_compare_when_many_requests_fail_marks_the_share_by_newcombes_interval() -> None:
    before, after = made_records(requests=300), made_records(requests=300)
    for record in after[100:160]:
        record.outcome = Outcome.FAILED
    found = compare((made_result(before), before), (made_result(after), after))
    failed = named(found, "failed")
    assert failed.significant and failed.better is False
    assert (failed.low, failed.high) == pytest.approx((0.1568, 0.2489), abs=5e-5)
    # Nothing failed before: there is no percentage of nothing, but a share has its points.
    assert failed.worsening() == 60 / 300


def test_worsening_when_the_figure_was_zero_is_without_bounds() -> None:
    difference = Difference(
        name="x", unit="ms", before=0.0, after=1.0, change=1.0, low=0.5, high=1.5, significant=True, better=False, gates=True
    )
    assert difference.worsening() == math.inf
    assert msgspec.structs.replace(difference, significant=False).worsening() == 0.0
    assert msgspec.structs.replace(difference, better=True).worsening() == 0.0


def test_compare_when_a_figure_is_missing_on_one_side_has_no_change() -> None:
    before, after = made_records(requests=60), made_records(requests=60)
    for record in after:
        record.stages, record.cached_tokens, record.prefill_worker_id, record.decode_worker_id = {}, None, "", ""
    found = compare((made_result(before), before), (made_result(after), after))
    for name in ("reuse", "stage prefill, mean"):
        difference = named(found, name)
        assert difference.before is not None
        assert (difference.after, difference.change, difference.low, difference.significant) == (None, None, None, False)


def test_compare_when_a_run_came_without_its_requests_is_refused() -> None:
    records = made_records(requests=60)
    with pytest.raises(BadInput, match="empty has no requests to compare"):
        compare((made_result(records), records), (made_result(records, name="empty"), []))
