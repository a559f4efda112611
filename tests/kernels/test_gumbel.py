"""Gumbel noise against its specification, an independent Philox in NumPy, and the distribution that it must have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.gumbel import gumbel_noise, philox_words
from services.core.noise import MAX_SEED, philox
from tests.numpy_philox import numpy_words

CPU = torch.device("cpu")
SEEDS = st.integers(0, MAX_SEED) | st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, MAX_SEED])
POSITIONS = st.integers(0, 2**20) | st.sampled_from([0, 2**31 - 1, 2**31, 2**32 - 1])
ROWS = st.lists(st.tuples(SEEDS, POSITIONS), min_size=1, max_size=4)
# Word 0 … 3 of the published all-ones vector cannot be reached through (seed, position); the all-zero one can.
ZERO_WORDS = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(ROWS, st.integers(1, 40))
@settings(deadline=None)
def test_philox_words_when_streams_are_any_equal_numpy_and_the_specification(rows: list[tuple[int, int]], num_calls: int) -> None:
    words = philox_words([seed for seed, _ in rows], [position for _, position in rows], num_calls, CPU)
    assert words.shape == (len(rows), 4 * num_calls)
    for (seed, position), row in zip(rows, words, strict=True):
        assert row.tolist() == numpy_words(seed, position, num_calls).tolist()
        last = num_calls - 1
        assert tuple(row[4 * last :].tolist()) == philox((last, position, 0, 0), (seed % 2**32, seed >> 32))


def test_philox_words_when_counter_and_key_are_zero_equal_the_known_answer() -> None:
    assert philox_words([0], [0], 1, CPU).tolist() == [ZERO_WORDS]


@given(ROWS, st.integers(1, 70))
@settings(deadline=None)
def test_gumbel_noise_when_rows_are_any_equals_the_reference_bit_for_bit(rows: list[tuple[int, int]], vocab_size: int) -> None:
    seeds, positions = [seed for seed, _ in rows], [position for _, position in rows]
    noise = gumbel_noise(seeds, positions, vocab_size, CPU)
    assert noise.dtype == torch.float32
    # The words are equal; the logarithm's last fp64 bit may differ between a vectorized and a scalar loop, once in 2**29 after rounding.
    assert torch.equal(noise, reference.gumbel_noise(seeds, positions, vocab_size))


@given(ROWS, st.integers(1, 300))
@settings(deadline=None)
def test_gumbel_noise_when_rows_are_any_equals_numpy_within_one_rounding(rows: list[tuple[int, int]], vocab_size: int) -> None:
    noise = gumbel_noise([seed for seed, _ in rows], [position for _, position in rows], vocab_size, CPU).numpy()
    for (seed, position), row in zip(rows, noise, strict=True):
        uniform = (numpy_words(seed, position, -(-vocab_size // 4))[:vocab_size].astype(np.float64) + 0.5) / 2.0**32
        np.testing.assert_array_max_ulp(row, (-np.log(-np.log(uniform))).astype(np.float32), maxulp=1)


def test_gumbel_noise_when_the_vocabulary_grows_then_the_tokens_before_keep_theirs() -> None:
    wide = gumbel_noise([5, 6], [9, 10], 1001, CPU)
    for vocab_size in (1, 2, 3, 4, 5, 1000):
        assert torch.equal(gumbel_noise([5, 6], [9, 10], vocab_size, CPU), wide[:, :vocab_size])


def test_gumbel_noise_when_rows_are_in_a_batch_equals_that_of_each_alone() -> None:
    seeds, positions = [3, 3, 4, MAX_SEED], [7, 8, 7, 7]
    batch = gumbel_noise(seeds, positions, 257, CPU)
    for row, seed, position in zip(batch, seeds, positions, strict=True):
        assert torch.equal(row, gumbel_noise([seed], [position], 257, CPU)[0])
    assert len({row.numpy().tobytes() for row in batch}) == 4


@pytest.mark.parametrize("axis", ["tokens", "positions", "seeds"])
def test_gumbel_noise_along_any_axis_has_the_distribution_of_gumbel(axis: str) -> None:
    """Kolmogorov-Smirnov, P(sqrt(n) * D > 2.4) = 2e-5; seeds are fixed, so only another generator could raise a false alarm."""
    count = 20_000
    match axis:
        case "tokens":
            sample = gumbel_noise([42], [17], count, CPU).flatten()
        case "positions":
            sample = gumbel_noise([42] * count, range(count), 1, CPU).flatten()
        case _:
            sample = gumbel_noise(range(count), [17] * count, 1, CPU).flatten()
    expected = np.exp(-np.exp(-np.sort(sample.double().numpy())))
    steps = np.arange(count + 1) / count
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert distance * math.sqrt(count) < 2.4


def test_gumbel_noise_of_neighbouring_streams_is_uncorrelated() -> None:
    """|r| of n independent pairs exceeds 4.5 / sqrt(n) with 7e-6; 6 pairs, fixed seeds."""
    count = 20_000
    rows = gumbel_noise([42, 43, 42, 42 + 2**32], [17, 17, 18, 17], count, CPU).double().numpy()
    correlation = np.corrcoef(rows)
    assert np.abs(correlation[np.triu_indices(4, k=1)]).max() < 4.5 / math.sqrt(count)


def test_gumbel_noise_when_words_are_extreme_is_finite() -> None:
    noise = gumbel_noise(range(64), [0] * 64, 4096, CPU)
    assert noise.isfinite().all()
    # 262,144 draws: the largest is near log(262144) = 12.5, the smallest near -log(12.5)
    assert 9 < noise.max() < 23
    assert -3.2 < noise.min() < -2
