import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.files import BadInput
from loadtest.prompts import token_ids
from loadtest.schedule import PlannedRequest
from loadtest.traces.mooncake import runs_of


def _tokens(
    ids: list[int], input_tokens: int, *, block_size: int = 16, seed: int = 0, vocab_size: int = 50_000, first_id: int = 100
) -> npt.NDArray[np.uint32]:
    request = PlannedRequest(at_s=0.0, input_tokens=input_tokens, output_tokens=1, block_runs=runs_of(ids))
    return token_ids(request, block_size=block_size, seed=seed, vocab_size=vocab_size, first_id=first_id)


def _shared(left: npt.NDArray[np.uint32], right: npt.NDArray[np.uint32]) -> int:
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length


block_lists = st.lists(st.integers(0, 2**40), max_size=6)


@given(block_lists, block_lists, block_lists, st.integers(0, 15), st.integers(0, 2**63))
def test_token_ids_of_prompts_with_equal_leading_ids_share_those_blocks_and_no_more(
    shared: list[int], left: list[int], right: list[int], short: int, seed: int
) -> None:
    left, right = [*shared, 5, *left], [*shared, 6, *right]
    tokens = [_tokens(ids, len(ids) * 16 - short, seed=seed) for ids in (left, right)]
    assert [len(found) for found in tokens] == [len(ids) * 16 - short for ids in (left, right)]
    # Two blocks begin with the same token once in 49,900 times, with the same three practically never.
    assert len(shared) * 16 <= _shared(*tokens) < len(shared) * 16 + 3


def test_token_ids_of_a_partly_filled_block_are_the_beginning_of_the_full_one() -> None:
    full = _tokens([3, 9], 32)
    for length in (17, 25, 31):
        assert (_tokens([3, 9], length) == full[:length]).all()


def test_token_ids_do_not_depend_on_the_length_of_blocks_where_they_begin() -> None:
    assert (_tokens([3], 16) == _tokens([3], 16, block_size=64)).all()


def test_token_ids_when_the_seed_differs_are_others() -> None:
    assert (_tokens([1, 2], 32, seed=1) != _tokens([1, 2], 32, seed=2)).sum() > 28


@pytest.mark.parametrize(("first_id", "vocab_size"), [(0, 8), (3, 259), (100, 151_940)])
def test_token_ids_are_spread_evenly_over_all_but_the_special_ones(first_id: int, vocab_size: int) -> None:
    found = _tokens(list(range(4_000)), 64_000, first_id=first_id, vocab_size=vocab_size)
    assert found.dtype == np.uint32
    assert found.min() >= first_id
    assert found.max() < vocab_size
    eighths = np.bincount((found.astype(np.int64) - first_id) * 8 // (vocab_size - first_id), minlength=8)
    assert np.abs(eighths - 8_000).max() < 5 * 8_000**0.5  # five standard deviations of a count


def test_token_ids_are_splitmix64_of_seed_block_and_position() -> None:
    # In plain integers: prompts of one run are compared with another's tokens, maybe of another version.
    def mixed(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    golden = 0x9E3779B97F4A7C15
    ids, seed = [0, 1, 2**40], 2**63 + 7
    expected = []
    for block in ids:
        of_block = mixed((block * golden + mixed(seed)) % 2**64)
        expected += [100 + (mixed((of_block + position * golden) % 2**64) >> 32) * 49_900 // 2**32 for position in range(1, 17)]
    assert _tokens(ids, 47, seed=seed).tolist() == expected[:47]


def test_token_ids_when_too_few_are_left_says_so() -> None:
    with pytest.raises(BadInput, match="vocabulary of 101 tokens has no two from 100 on"):
        _tokens([1], 16, vocab_size=101)
