"""Noise keys: Philox against the published vectors, and seeds of choices that never meet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.noise import MASK, MAX_SEED, choice_seed, draw_seed, philox

WORDS = st.integers(0, MASK)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK, MASK, MASK, MASK), (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_when_given_the_known_answers_of_random123_equals_them(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox(counter, key) == expected


@given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS))
def test_philox_when_anything_goes_in_then_four_32_bit_words_come_out(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    words = philox(counter, key)
    assert len(words) == 4
    assert all(0 <= word <= MASK for word in words)


@given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS))
def test_philox_under_one_key_is_one_to_one(
    left: tuple[int, int, int, int], right: tuple[int, int, int, int], key: tuple[int, int]
) -> None:
    assert (philox(left, key) == philox(right, key)) == (left == right)


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED])
def test_choice_seed_of_the_first_choice_is_the_request_s_own(seed: int) -> None:
    assert choice_seed(seed, 0) == seed


def test_choice_seed_when_many_seeds_and_choices_meet_then_none_are_equal() -> None:
    seeds = [choice_seed(seed, choice) for seed in [*range(50), MAX_SEED] for choice in range(128)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_choice_seed_when_computed_today_equals_that_of_the_first_release() -> None:
    """A request that is repeated with its seed after an upgrade must give the same choices."""
    assert choice_seed(7, 1) == 2670282796783250599


def test_draw_seed_when_called_often_then_64_bit_seeds_differ() -> None:
    seeds = {draw_seed() for _ in range(100)}
    assert len(seeds) == 100  # false alarm: 100² / 2 / 2**64
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
