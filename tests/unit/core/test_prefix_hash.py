"""Prefix hashes: one look-up answers for the whole prefix, and tenants, models and tokens never run together."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.prefix_hash import HASH_BYTES, ROOT, TOKEN_BYTES, block_hash, chain_hashes, pack_tokens, prefix_key

KEY = prefix_key(model_fingerprint=b"model")
TOKENS = st.lists(st.integers(0, 3) | st.integers(0, 2**32 - 1), max_size=40)
BLOCK_SIZES = st.integers(1, 9)
PARTS = st.binary(max_size=12)


@given(TOKENS, TOKENS, BLOCK_SIZES)
def test_chain_hashes_when_a_prefix_is_equal_then_exactly_its_blocks_share_hashes(
    left: list[int], right: list[int], block_size: int
) -> None:
    hashes = [chain_hashes(KEY, pack_tokens(tokens), block_size) for tokens in (left, right)]
    for index, (left_hash, right_hash) in enumerate(zip(*hashes, strict=False)):
        end = (index + 1) * block_size
        assert (left_hash == right_hash) == (left[:end] == right[:end])


@given(TOKENS, st.integers(0, 40), BLOCK_SIZES)
def test_chain_hashes_when_tokens_are_cut_then_the_hashes_are_a_prefix_of_the_whole(tokens: list[int], cut: int, block_size: int) -> None:
    whole = chain_hashes(KEY, pack_tokens(tokens), block_size)
    head = chain_hashes(KEY, pack_tokens(tokens[:cut]), block_size)
    assert head == whole[: len(head)]


@given(TOKENS, st.integers(0, 40), BLOCK_SIZES)
def test_chain_hashes_when_continued_from_a_parent_then_they_equal_the_whole(tokens: list[int], num_blocks: int, block_size: int) -> None:
    whole = chain_hashes(KEY, pack_tokens(tokens), block_size)
    head = whole[:num_blocks]
    rest = pack_tokens(tokens[len(head) * block_size :])
    assert head + chain_hashes(KEY, rest, block_size, parent=head[-1] if head else ROOT) == whole


@given(TOKENS, BLOCK_SIZES)
def test_chain_hashes_when_unrolled_then_each_is_the_block_hash_of_its_parent_and_tokens(tokens: list[int], block_size: int) -> None:
    parent = ROOT
    for index, value in enumerate(chain_hashes(KEY, pack_tokens(tokens), block_size)):
        parent = block_hash(KEY, parent, pack_tokens(tokens[index * block_size : (index + 1) * block_size]))
        assert value == parent
        assert len(value) == HASH_BYTES


@pytest.mark.parametrize(("num_tokens", "num_hashes"), [(0, 0), (1, 0), (15, 0), (16, 1), (17, 1), (31, 1), (32, 2), (33, 2)])
def test_chain_hashes_when_the_last_block_is_partly_filled_then_it_has_none(num_tokens: int, num_hashes: int) -> None:
    assert len(chain_hashes(KEY, pack_tokens(range(num_tokens)), 16)) == num_hashes


def test_chain_hashes_when_given_a_memoryview_then_they_equal_those_of_the_bytes() -> None:
    packed = pack_tokens(range(10))
    assert chain_hashes(KEY, memoryview(packed), 4) == chain_hashes(KEY, packed, 4)


def test_chain_hashes_when_a_block_repeats_then_its_place_still_counts() -> None:
    assert len(set(chain_hashes(KEY, pack_tokens([7] * 64), 8))) == 8


def test_chain_hashes_when_the_block_size_differs_then_no_hash_is_shared() -> None:
    packed = pack_tokens(range(64))
    assert not set(chain_hashes(KEY, packed, 8)) & set(chain_hashes(KEY, packed, 16))


@given(st.tuples(PARTS, PARTS), st.tuples(PARTS, PARTS))
def test_prefix_key_when_model_or_salt_differs_then_neither_keys_nor_hashes_are_equal(
    left: tuple[bytes, bytes], right: tuple[bytes, bytes]
) -> None:
    left_key, right_key = (prefix_key(model_fingerprint=model, salt=salt) for model, salt in (left, right))
    assert (left_key == right_key) == (left == right)
    packed = pack_tokens(range(32))
    assert bool(set(chain_hashes(left_key, packed, 8)) & set(chain_hashes(right_key, packed, 8))) == (left == right)


@pytest.mark.parametrize(
    ("left", "right"),
    [((b"ab", b"c"), (b"a", b"bc")), ((b"abc", b""), (b"", b"abc")), ((b"", b"\0" * 8), (b"\0" * 8, b"")), ((b"m", b""), (b"m", b"\0"))],
)
def test_prefix_key_when_parts_have_the_same_bytes_together_then_their_lengths_tell_them_apart(
    left: tuple[bytes, bytes], right: tuple[bytes, bytes]
) -> None:
    assert prefix_key(model_fingerprint=left[0], salt=left[1]) != prefix_key(model_fingerprint=right[0], salt=right[1])


def test_prefix_key_without_a_salt_is_that_of_the_empty_salt_and_32_bytes_long() -> None:
    assert prefix_key(model_fingerprint=b"model", salt=b"") == KEY
    assert len(KEY) == 32


@given(TOKENS)
def test_pack_tokens_when_unpacked_as_little_endian_uint32_then_the_ids_come_back(tokens: list[int]) -> None:
    packed = pack_tokens(tokens)
    assert len(packed) == TOKEN_BYTES * len(tokens)
    assert list(struct.unpack(f"<{len(tokens)}I", packed)) == tokens


def test_pack_tokens_when_an_id_has_four_different_bytes_then_the_lowest_comes_first() -> None:
    assert pack_tokens([0x01020304]) == b"\x04\x03\x02\x01"


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**64])
def test_pack_tokens_when_an_id_is_no_uint32_raises_overflow_error(token_id: int) -> None:
    with pytest.raises(OverflowError):
        pack_tokens([0, token_id])


def test_hashes_when_computed_today_equal_those_of_the_first_release() -> None:
    """Workers of different versions share an index: a changed hash would silently empty every prefix cache."""
    key = prefix_key(model_fingerprint=b"fingerprint", salt=b"tenant")
    first, second = chain_hashes(key, pack_tokens(range(32)), 16)
    assert key.hex() == "2545ef3088c4a2899f4af6aa0c4593c93554e27bca3a487b826bc8e744fc723e"
    assert first.hex() == "dd1186e2706f59a13bdfac39bb1a723d"
    assert second.hex() == "4ca16e201cc35a163fad836e55d3813f"
