"""What is learnt of costs: how fast, how robustly, and that it can never become nonsense."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.cost_model import (
    HALF_LIFE_S,
    MAX_LOG_FACTOR,
    CostModel,
    DeclaredPrefill,
    DeclaredStep,
    LearntPrefill,
    LearntStep,
    RelativeFit,
    Slowness,
    WorkerCosts,
)

BLOCK_BYTES = 1 << 20


def make_costs(num_rows: int) -> WorkerCosts:
    costs = WorkerCosts(CostModel.learnt(block_bytes=BLOCK_BYTES))
    costs.resize(prefill=np.zeros(num_rows), step=np.zeros(num_rows), wire=np.zeros(num_rows))
    for row in range(num_rows):
        costs.reset(row)
    return costs


def true_prefill_s(new_tokens: int, cached_tokens: int) -> float:
    return 8e-3 + 20e-6 * new_tokens + 3e-9 * new_tokens * (new_tokens + 2 * cached_tokens)


# Shapes


def test_learnt_prefill_when_prompts_differ_predicts_within_two_percent() -> None:
    draw, shape = random.Random(0), LearntPrefill()
    for _ in range(300):
        new, cached = draw.randint(1, 20_000), draw.choice([0, 0, 5000, 50_000])
        shape.observe(new, cached, true_prefill_s(new, cached) * draw.uniform(0.95, 1.05))
    for new, cached in ((100, 0), (2000, 0), (2000, 30_000), (20_000, 0)):
        assert shape.seconds(new, cached) == pytest.approx(true_prefill_s(new, cached), rel=0.02)


def test_learnt_prefill_after_one_observation_has_its_scale_and_keeps_the_prior_s_proportions() -> None:
    shape, prior = LearntPrefill(), LearntPrefill()
    shape.observe(1000, 0, 100 * prior.seconds(1000, 0))
    assert shape.seconds(1000, 0) == pytest.approx(100 * prior.seconds(1000, 0), rel=0.01)
    assert shape.seconds(4000, 0) == pytest.approx(100 * prior.seconds(4000, 0), rel=0.3)


def test_learnt_prefill_when_all_prompts_are_equal_stays_usable_for_others() -> None:
    shape = LearntPrefill()
    for _ in range(300):
        shape.observe(1000, 0, 0.1)
    assert shape.seconds(1000, 0) == pytest.approx(0.1, rel=0.01)
    assert 0.0 < shape.seconds(1, 0) < 0.1 < shape.seconds(2000, 0) < 0.5


def test_learnt_prefill_when_some_prompts_stall_or_are_cut_short_hardly_moves() -> None:
    draw, shape = random.Random(0), LearntPrefill()
    for i in range(200):
        new = draw.randint(100, 5000)
        odd = 50.0 if i % 10 == 0 else 0.02 if i % 100 == 13 else 1.0  # the very first one stalls
        shape.observe(new, 0, true_prefill_s(new, 0) * odd)
        if i > 20:
            assert shape.seconds(2000, 0) == pytest.approx(true_prefill_s(2000, 0), rel=0.15)


def test_learnt_prefill_when_all_workers_become_slower_follows() -> None:
    draw, shape = random.Random(0), LearntPrefill()
    for scale, rounds in ((1.0, 300), (2.0, 1500)):
        for _ in range(rounds):
            new = draw.randint(100, 5000)
            shape.observe(new, 0, scale * true_prefill_s(new, 0))
    assert shape.seconds(2000, 0) == pytest.approx(2 * true_prefill_s(2000, 0), rel=0.03)


def test_learnt_step_when_batches_differ_predicts_within_three_percent() -> None:
    draw, shape = random.Random(0), LearntStep()
    for _ in range(400):
        running, used = draw.randint(1, 64), draw.randint(0, 5000)
        shape.observe(running, used, 10_000, (6e-3 + 0.1e-3 * running + 4e-6 * used) * draw.uniform(0.95, 1.05))
    for running, used in ((1, 10), (32, 2500), (64, 5000)):
        assert shape.seconds(running, used, 10_000) == pytest.approx(6e-3 + 0.1e-3 * running + 4e-6 * used, rel=0.03)


def test_declared_shapes_give_the_published_milliseconds() -> None:
    prefill = DeclaredPrefill(constant_s=16.50142e-3, per_token_s=1.518344e-5, per_token_squared_s=4.209989e-10, chunk_tokens=8192)

    def chunk_ms(x: float) -> float:
        return 4.209989e-07 * x * x + 1.518344e-02 * x + 16.50142

    assert prefill.seconds(5000, 0) * 1e3 == pytest.approx(chunk_ms(5000))
    assert prefill.seconds(8192, 99) * 1e3 == pytest.approx(chunk_ms(8192))
    assert prefill.seconds(20_000, 0) * 1e3 == pytest.approx(3 * chunk_ms(20_000 / 3))
    assert prefill.seconds(0, 99) == 0.0
    step = DeclaredStep(constant_s=5.74e-3, per_share_s=54.01e-3, per_share_squared_s=-25.74e-3)
    assert step.seconds(7, 500, 2000) * 1e3 == pytest.approx(-25.74 / 16 + 54.01 / 4 + 5.74)
    assert step.seconds(7, 9999, 2000) == step.seconds(7, 2000, 2000)


def test_declared_model_never_learns() -> None:
    shape = DeclaredPrefill(constant_s=1e-3, per_token_s=1e-6, per_token_squared_s=0.0, chunk_tokens=100)
    model = CostModel.declared(prefill=shape, step=DeclaredStep(constant_s=1e-3, per_share_s=0.0, per_share_squared_s=0.0))
    costs = WorkerCosts(model)
    costs.resize(prefill=np.ones(1), step=np.ones(1), wire=np.ones(1))
    for i in range(10):
        costs.observe_prefill(0, new_tokens=100, cached_tokens=0, seconds=9.0, now_s=float(i))
        costs.observe_steps(0, running=1, used_blocks=1, total_blocks=2, seconds=9.0, now_s=float(i))
        costs.observe_transfer(0, num_blocks=1, seconds=9.0, tail_s=9.0, now_s=float(i))
        model.note_overhead(1.0, is_local=True)
    costs.drift(20.0)
    assert (costs.prefill.factor[0], costs.step.factor[0], costs.wire.factor[0]) == (1.0, 1.0, 1.0)
    assert shape.seconds(100, 0) == pytest.approx(1.1e-3) and model.local_overhead_s == 0.0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.integers(0, 10**6), st.floats(1e-9, 1e6)),
        min_size=1,
        max_size=30,
    )
)
def test_fit_whatever_is_observed_stays_finite_and_not_negative(observations: list[tuple[int, int, float]]) -> None:
    shape = LearntPrefill()
    for new, cached, seconds in observations:
        shape.observe(new, cached, seconds)
    predicted = [shape.seconds(new, 0) for new in (1, 1000, 100_000)]
    assert all(0.0 <= seconds < math.inf for seconds in predicted) and predicted == sorted(predicted)


def test_fit_finds_the_least_squares_among_non_negative_coefficients() -> None:
    # Seconds that fall with the second feature: the best non-negative answer leaves it out.
    fit = RelativeFit((1.0, 1.0))
    for x in (0.0, 0.5, 1.0):
        fit.observe((1.0, x), 2.0 - x)
    constant, slope = fit.coefficients
    ratios = np.array([1 / 2.0, 1 / 1.5, 1.0])
    assert slope == pytest.approx(0.0, abs=1e-3)
    assert constant == pytest.approx(ratios.sum() / (ratios**2).sum(), rel=0.1)


# Slowness


def observed(slowness: Slowness, row: int, ratios: list[float], *, start_s: float = 0.0) -> float:
    for i, ratio in enumerate(ratios):
        slowness.observe(row, ratio, start_s + 0.1 * i)
    return slowness.factor.item(row)


@pytest.fixture
def slowness() -> Slowness:
    value = Slowness()
    value.resize(np.ones(5))
    for row in range(4):
        observed(value, row, [1.0] * 10)
    return value


def test_slowness_when_a_worker_becomes_three_times_slower_is_seen_after_four_observations(slowness: Slowness) -> None:
    assert observed(slowness, 0, [3.0] * 4, start_s=1.0) > 2.2
    assert observed(slowness, 0, [3.0] * 8, start_s=1.4) == pytest.approx(3.0, rel=0.15)
    assert observed(slowness, 0, [1.0] * 5, start_s=2.2) < 1.4


def test_slowness_when_a_single_observation_is_odd_moves_by_a_sixth_at_most(slowness: Slowness) -> None:
    assert observed(slowness, 0, [1000.0], start_s=1.0) < 1.2
    assert observed(slowness, 1, [0.001], start_s=1.0) > 1 / 1.2
    assert observed(slowness, 0, [1.0] * 10, start_s=1.1) == pytest.approx(1.0, abs=0.03)


def test_slowness_when_one_observation_contradicts_many_is_not_swayed_by_it(slowness: Slowness) -> None:
    slow = observed(slowness, 0, [3.0, 3.0, 3.0, 8.0, 16.0, 32.0], start_s=1.0)
    assert observed(slowness, 0, [0.1], start_s=1.6) > slow / 1.25


def test_slowness_when_surprises_alternate_does_not_run_away(slowness: Slowness) -> None:
    assert 0.8 < observed(slowness, 0, [3.0, 0.33] * 20, start_s=1.0) < 1.25


def test_slowness_when_not_observed_drifts_back_to_the_fleet(slowness: Slowness) -> None:
    slow = observed(slowness, 0, [3.0] * 20, start_s=1.0)
    slowness.drift(3.0 + HALF_LIFE_S)
    assert slowness.factor[0] == pytest.approx(math.sqrt(slow), rel=0.1)
    slowness.drift(3.0 + 10 * HALF_LIFE_S)
    assert slowness.factor[0] == pytest.approx(1.0, abs=0.01)
    # What was known has faded, so one observation counts from the fleet's, not from the old value.
    assert observed(slowness, 0, [1.0], start_s=200.0) == pytest.approx(1.0, abs=0.01)


def test_slowness_of_a_new_worker_is_the_fleet_s_median(slowness: Slowness) -> None:
    for row in range(4):
        observed(slowness, row, [4.0 if row else 8.0] * 30, start_s=1.0)
    slowness.drift(4.0)
    slowness.reset(4)
    assert slowness.factor[4] == pytest.approx(4.0, rel=0.05)
    slowness.reset(0)
    assert slowness.factor[0] == pytest.approx(4.0, rel=0.05)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-300, 1e300), st.floats(0, 100)), max_size=60))
def test_slowness_whatever_is_observed_stays_bounded(observations: list[tuple[float, float]]) -> None:
    slowness = Slowness()
    slowness.resize(np.ones(2))
    now_s = 0.0
    for ratio, seconds in observations:
        now_s += seconds
        slowness.observe(0, ratio, now_s)
        slowness.drift(now_s)
        limit = math.exp(MAX_LOG_FACTOR) * 1.01
        assert 1 / limit <= slowness.factor[0] <= limit and 1 / limit <= slowness.factor[1] <= limit


# A worker's costs


def test_equal_workers_when_their_prompts_take_longer_by_chance_stay_nearly_equal() -> None:
    costs = make_costs(8)
    draw = random.Random(3)
    furthest = 0.0
    for i in range(1000):
        new = draw.randint(500, 20_000)
        seconds = true_prefill_s(new, 0) * draw.uniform(1.0, 1.6)
        costs.observe_prefill(draw.randrange(8), new_tokens=new, cached_tokens=0, seconds=seconds, now_s=0.05 * i)
        if i > 200:
            furthest = max(furthest, float(np.ptp(np.log(costs.prefill.factor))))
    assert furthest < 0.19  # 0.22 when all that was seen is believed


def test_prompt_computed_together_with_others_does_not_make_its_worker_look_slow() -> None:
    costs = make_costs(2)
    for i in range(40):
        costs.observe_prefill(i % 2, new_tokens=1000, cached_tokens=0, seconds=true_prefill_s(1000, 0), now_s=0.1 * i)
    for i in range(20):
        # In a step with as much again, and half as much, of somebody else's.
        alone_s = true_prefill_s(1000, 0)
        costs.observe_prefill(0, new_tokens=1000, cached_tokens=0, seconds=1.8 * alone_s, now_s=4.0 + 0.1 * i, beside_s=1.5 * alone_s)
        costs.observe_prefill(1, new_tokens=1000, cached_tokens=0, seconds=alone_s, now_s=4.0 + 0.1 * i)
    assert costs.prefill.factor[0] < 1.25 * costs.prefill.factor[1]


def test_prompt_that_took_longer_than_all_with_it_explain_makes_its_worker_look_slow() -> None:
    costs = make_costs(3)
    alone_s = true_prefill_s(1000, 0)
    for i in range(60):
        slow = i % 3 == 0
        seconds = (6.0 if slow else 1.0) * alone_s
        costs.observe_prefill(i % 3, new_tokens=1000, cached_tokens=0, seconds=seconds, now_s=0.1 * i, beside_s=alone_s if slow else 0.0)
    assert costs.prefill.factor[0] > 2.5 * costs.prefill.factor[1]


def test_slow_worker_does_not_spoil_the_shape_and_scale_ends_up_in_one_place() -> None:
    draw, costs = random.Random(0), make_costs(5)
    for i in range(1000):
        row, new = i % 5, draw.randint(100, 5000)
        costs.observe_prefill(row, new_tokens=new, cached_tokens=0, seconds=true_prefill_s(new, 0) * (3 if row == 4 else 1), now_s=0.01 * i)
        costs.drift(0.01 * i)
    model = costs._model
    for row in range(5):
        predicted = model.prefill.seconds(2000, 0) * costs.prefill.factor.item(row)
        assert predicted == pytest.approx(true_prefill_s(2000, 0) * (3 if row == 4 else 1), rel=0.1)


def test_slow_worker_that_gets_the_long_prompts_does_not_make_long_prompts_look_dear() -> None:
    draw, costs = random.Random(0), make_costs(5)
    for i in range(2000):
        row = i % 5
        new = draw.randint(4000, 8000) if (row == 4) == (draw.random() < 0.95) else draw.randint(100, 1000)
        costs.observe_prefill(row, new_tokens=new, cached_tokens=0, seconds=true_prefill_s(new, 0) * (3 if row == 4 else 1), now_s=0.01 * i)
        costs.drift(0.01 * i)
    for new in (500, 6000):
        predicted = costs._model.prefill.seconds(new, 0) * costs.prefill.factor.item(0)
        assert predicted == pytest.approx(true_prefill_s(new, 0), rel=0.15)


def test_slow_worker_that_runs_the_full_batches_does_not_make_full_batches_look_dear() -> None:
    draw, costs = random.Random(0), make_costs(5)
    for i in range(2000):
        row = i % 5
        running = draw.randint(40, 64) if (row == 4) == (draw.random() < 0.95) else draw.randint(1, 10)
        seconds = (5e-3 + 0.5e-3 * running) * (3 if row == 4 else 1)
        costs.observe_steps(row, running=running, used_blocks=0, total_blocks=1000, seconds=seconds, now_s=0.01 * i)
        costs.drift(0.01 * i)
    for running in (5, 60):
        predicted = costs._model.step.seconds(running, 0, 1000) * costs.step.factor.item(0)
        assert predicted == pytest.approx(5e-3 + 0.5e-3 * running, rel=0.15)


def test_first_observation_when_the_prior_is_far_off_is_enough_for_all_workers() -> None:
    costs = make_costs(3)
    costs.observe_prefill(0, new_tokens=1000, cached_tokens=0, seconds=7.0, now_s=0.0)
    for row in range(3):
        assert costs._model.prefill.seconds(1000, 0) * costs.prefill.factor.item(row) == pytest.approx(7.0, rel=0.05)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_observations_that_cannot_be_are_left_out(seconds: float) -> None:
    costs, untouched = make_costs(1), make_costs(1)
    costs.observe_prefill(0, new_tokens=10, cached_tokens=0, seconds=seconds, now_s=0.0)
    costs.observe_prefill(0, new_tokens=0, cached_tokens=10, seconds=1.0, now_s=0.0)
    costs.observe_steps(0, running=2, used_blocks=1, total_blocks=10, seconds=seconds, now_s=0.0)
    costs.observe_steps(0, running=0, used_blocks=1, total_blocks=10, seconds=1.0, now_s=0.0)
    costs.observe_transfer(0, num_blocks=1, seconds=seconds, tail_s=0.0, now_s=0.0)
    costs.observe_transfer(0, num_blocks=0, seconds=1.0, tail_s=0.0, now_s=0.0)
    costs.observe_transfer(0, num_blocks=1, seconds=1.0, tail_s=seconds if seconds else math.nan, now_s=0.0)
    for ours, theirs in zip(costs._all, untouched._all, strict=True):
        assert ours.factor[0] == theirs.factor[0] == 1.0
    assert costs._model.prefill.seconds(1000, 0) == untouched._model.prefill.seconds(1000, 0)


def test_transfer_when_it_waited_for_the_prompt_does_not_look_like_a_slow_link() -> None:
    costs = make_costs(2)
    expected_s = 100 * costs._model.wire_s_per_block
    for i in range(30):
        costs.observe_transfer(0, num_blocks=100, seconds=20 * expected_s, tail_s=0.01 * expected_s, now_s=0.1 * i)
        costs.observe_transfer(1, num_blocks=100, seconds=20 * expected_s, tail_s=15 * expected_s, now_s=0.1 * i)
    assert costs.wire.factor[0] == 1.0
    assert costs.wire.factor[1] == pytest.approx(20.0, rel=0.1)


def test_transfer_when_faster_than_expected_is_believed_even_if_it_waited() -> None:
    costs = make_costs(1)
    expected_s = 100 * costs._model.wire_s_per_block
    for i in range(20):
        costs.observe_transfer(0, num_blocks=100, seconds=expected_s / 5, tail_s=0.0, now_s=0.1 * i)
    assert costs.wire.factor[0] == pytest.approx(0.2, rel=0.2)


def test_overhead_when_one_first_token_stalls_hardly_moves_and_is_never_negative() -> None:
    model = CostModel.learnt(block_bytes=BLOCK_BYTES)
    before = model.remote_overhead_s
    model.note_overhead(100.0, is_local=False)
    assert model.remote_overhead_s <= 1.11 * before and model.local_overhead_s == before
    for _ in range(500):
        model.note_overhead(-1.0, is_local=False)
    model.note_overhead(math.nan, is_local=False)
    assert 0.0 <= model.remote_overhead_s < 1e-5


def test_token_cost_follows_the_length_of_recent_prompts() -> None:
    model = CostModel.learnt(block_bytes=BLOCK_BYTES)
    for _ in range(500):
        model.note_prompt(100, model.prefill.seconds(100, 0))
    short = model.token_s
    for _ in range(500):
        model.note_prompt(10_000, model.prefill.seconds(10_000, 0))
    assert short == pytest.approx(model.prefill.seconds(100, 0) / 100, rel=0.01)
    assert model.token_s == pytest.approx(model.prefill.seconds(10_000, 0) / 10_000, rel=0.01)


def test_steps_when_the_fit_has_no_term_for_them_are_left_out() -> None:
    """Steps that grow a little faster than the blocks they read leave a fit of that term alone; then a worker reports no block at all."""
    costs = make_costs(1)
    for i in range(200):
        used = 200 + (i * 37) % 800
        costs.observe_steps(0, running=8.0, used_blocks=used, total_blocks=2000, seconds=2e-6 * used**1.3, now_s=0.5 * i)
    before = costs.step.factor.item(0)
    costs.observe_steps(0, running=8.0, used_blocks=0, total_blocks=2000, seconds=1e-3, now_s=100.0)
    assert math.isfinite(costs.step.factor.item(0)) and before > 0.0
