"""Resamples: their make, and the draws of figures against counting by hand and against known laws."""

import numpy as np
import pytest

from loadtest.report.bootstrap import MIN_RESAMPLES, mean_draws, percentile_draws, ratio_draws, resample


def test_resample_when_drawn_has_as_many_requests_as_the_run_in_blocks_of_neighbours() -> None:
    weights = resample(100, seed=1)
    assert (weights.sum(axis=1) == 100).all()
    # Blocks of 9 (2 ∛100): a request is nearly always drawn as often as its neighbour.
    assert (np.diff(weights) != 0).sum(axis=1).mean() < 2 * 100 / 9 + 2
    assert (resample(100, seed=1) == weights).all() and (resample(100, seed=2) != weights).any()


@pytest.mark.parametrize("num_requests", [1, 2, 7])
def test_resample_when_there_are_few_requests_still_has_that_many(num_requests: int) -> None:
    assert (resample(num_requests, seed=0).sum(axis=1) == num_requests).all()


def test_resample_when_a_run_is_long_draws_fewer() -> None:
    assert len(resample(100_000, seed=0)) == MIN_RESAMPLES


def test_draws_when_weights_are_given_are_those_counted_by_hand() -> None:
    weights = np.array([[1.0, 1, 1, 1], [0, 2, 0, 2], [3, 0, 1, 0]])
    values = np.array([10.0, 20, np.nan, 40])
    assert mean_draws(values, weights) == pytest.approx([70 / 3, 30, 10])
    assert ratio_draws(np.array([1.0, 0, 1, 1]), np.array([2.0, 2, 2, 2]), weights) == pytest.approx([3 / 8, 2 / 8, 4 / 8])
    p50, p100 = percentile_draws(values, weights, (50, 100))
    assert p50.tolist() == [20, 20, 10] and p100.tolist() == [40, 40, 10]


def test_draws_when_a_resample_has_no_value_are_unknown() -> None:
    weights = np.array([[0.0, 2.0]])
    assert np.isnan(mean_draws(np.array([1.0, np.nan]), weights)).all()
    assert np.isnan(percentile_draws(np.array([1.0, np.nan]), weights, (50,))[0]).all()
    assert np.isnan(percentile_draws(np.array([np.nan, np.nan]), weights, (50,))[0]).all()


def test_mean_draws_when_requests_are_independent_spread_as_the_mean_does_and_wider_when_neighbours_are_alike() -> None:
    rng = np.random.default_rng(5)
    weights = resample(2000, seed=0)
    independent = rng.normal(0, 1, 2000)
    assert mean_draws(independent, weights).std() == pytest.approx(1 / np.sqrt(2000), rel=0.15)
    alike = np.repeat(rng.normal(0, 1, 200), 10)
    assert mean_draws(alike, weights).std() == pytest.approx(1 / np.sqrt(200), rel=0.3)
