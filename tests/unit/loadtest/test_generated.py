"""The generator against the figures of the trace that it is like."""

import numpy as np
import pytest

from loadtest.ceilings import infinite_reuse
from loadtest.metrics import Distribution, distribution
from loadtest.schedule import Schedule
from loadtest.traces.generated import generate


@pytest.fixture(scope="module")
def hour() -> Schedule:
    return generate(12_031, seed=0)


def _found(values: list[int]) -> Distribution:
    found = distribution([float(value) for value in values])
    assert found is not None
    return found


def test_generated_hour_has_the_lengths_of_the_trace(hour: Schedule) -> None:
    inputs = _found([request.input_tokens for request in hour.requests])
    outputs = _found([request.output_tokens for request in hour.requests])
    # A twentieth; a tenth of the tail, where 120 requests decide.
    assert (inputs.mean, inputs.p50, inputs.p90) == pytest.approx((12_035, 6_909, 27_367), rel=0.05)
    assert (outputs.mean, outputs.p50, outputs.p90) == pytest.approx((343, 350, 597), rel=0.05)
    assert (inputs.p99, outputs.p99) == pytest.approx((85_400, 1_118), rel=0.1)


def test_generated_hour_comes_as_a_poisson_process_of_the_rate_of_the_trace(hour: Schedule) -> None:
    times_s = np.array([request.at_s for request in hour.requests])
    gaps = np.diff(times_s)
    assert 1 / gaps.mean() == pytest.approx(3.4, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.05)


def test_generated_hour_shares_as_much_as_the_trace(hour: Schedule) -> None:
    assert infinite_reuse(hour) == pytest.approx(0.373, abs=0.03)
    assert infinite_reuse(hour.first(num_requests=5_719)) == pytest.approx(0.347, abs=0.03)
    seen: dict[int, float] = {}  # second block → when it came last
    num_new, waits_s = 0, []
    for request in hour.requests:
        assert request.block_ids()[0] == 0
        if request.input_tokens < 1024:
            num_new += 1
            continue
        second = request.block_ids()[1]
        if second in seen:
            waits_s.append(request.at_s - seen[second])
        else:
            num_new += 1
        seen[second] = request.at_s
    assert num_new / len(hour) == pytest.approx(0.61, abs=0.03)
    # Less than the think times' 123 and 483 s: who thinks longer than the hour lasts does not come back.
    assert np.percentile(waits_s, [50, 90]) == pytest.approx([123, 483], rel=0.15)


def test_generated_prompts_continue_the_one_before_and_leave_room_for_its_answer() -> None:
    schedule = generate(2_000, rate=50.0, think_s=1.0, sessions=True, block_size=64, seed=5)
    num_continued = 0
    for request in schedule.requests:
        assert len(request.block_ids()) == -(-request.input_tokens // 64)
        assert request.block_ids()[:8] == list(range(8))
        if request.after is None:
            assert request.block_ids()[8] not in range(8)
            continue
        num_continued += 1
        before = schedule.requests[request.after]
        kept = before.input_tokens // 64
        assert before.session == request.session
        assert request.block_ids()[:kept] == before.block_ids()[:kept]
        assert request.block_ids()[kept] not in before.block_ids()
        assert request.input_tokens > before.input_tokens + before.output_tokens
    assert num_continued > 500


def test_generated_sessions_are_the_same_requests_with_think_times() -> None:
    plain, sessions = (generate(500, rate=20.0, think_s=2.0, sessions=sessions, seed=5) for sessions in (False, True))
    assert [request.block_runs for request in plain.requests] == [request.block_runs for request in sessions.requests]
    assert sessions.earliest_s == pytest.approx([request.at_s for request in plain.requests])
    assert {request.session for request in plain.requests} == {""}


def test_generated_tenants_have_shares_and_system_blocks_of_their_own() -> None:
    schedule = generate(4_000, num_tenants=3, seed=2)
    names = [request.tenant for request in schedule.requests]
    shares = [names.count(f"tenant-{number}") / len(names) for number in range(3)]
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.05)
    blocks = {
        name: {block for request in schedule.requests if request.tenant == name for block in request.block_ids()} for name in set(names)
    }
    assert sum(len(of_one) for of_one in blocks.values()) == len(set.union(*blocks.values()))


def test_generated_when_a_block_is_longer_than_the_system_prompt_does_not_share_it() -> None:
    schedule = generate(200, block_size=1024, seed=1)
    firsts = [request.block_ids()[0] for request in schedule.requests if request.after is None]
    assert len(set(firsts)) > 150


@pytest.mark.parametrize("burstiness", [1.0, 0.3])
def test_generated_depends_on_the_seed_and_begins_alike_however_many(burstiness: float) -> None:
    many, few, other = (generate(count, burstiness=burstiness, seed=seed) for count, seed in ((300, 4), (200, 4), (200, 5)))
    assert many.first(num_requests=200).digest == few.digest != other.digest
