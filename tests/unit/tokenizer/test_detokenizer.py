"""The contract of a detokenizer: all pieces are the decode of all ids, no piece has half a character, a token costs O(1)."""

import codecs
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from services.tokenizer.detokenizer import CONTEXT_TOKENS, REPLACEMENT, ByteLevelDetokenizer, WindowDetokenizer, byte_alphabet
from services.tokenizer.tokenizer import Tokenizer

KINDS = [
    "byte_level",
    "byte_level_in_sequence",
    "byte_level_after_replace",
    "byte_level_normalizer",
    "byte_fallback",
    "byte_fallback_without_strip",
    "byte_fallback_with_deep_strip",
    "metaspace",
    "word_piece",
    "word_suffix",
    "no_decoder",
]
# Ids of runs like "a multi-byte character, cut and mended" are rare among uniform ids: mix in encoded text and small alphabets.
TEXTS = st.text(max_size=12) | st.text(alphabet="aé日😀 ▁\n" + REPLACEMENT, max_size=12)
MARKS = st.sampled_from(["<s>", "▁" * 9, "<0x42>", "</s>", "<|zażółć|>", "<tool call>", "Größe größer", "日本", "é", "keep me", "the the"])


@st.composite
def id_streams(draw: st.DrawFn, tokenizer: Tokenizer) -> list[list[int]]:
    """Pushes of ids: random ones (some outside the vocabulary), bytes, encoded text, special and added tokens, cut anywhere."""
    ids: list[int] = []
    for _ in range(draw(st.integers(0, 6))):
        source = draw(st.integers(0, 3))
        if source == 0:
            ids += draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=6))
        elif source == 1:
            ids += draw(st.lists(st.integers(1, 270), max_size=6))
        else:
            ids += tokenizer.encode(draw(TEXTS if source == 2 else MARKS), add_special_tokens=False)
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    if draw(st.booleans()):
        cuts = list(range(len(ids)))
    return [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_pieces_when_ids_are_random_then_they_add_up_to_the_whole_decode(
    tokenizers_by_kind: dict[str, Tokenizer], kind: str, skip_special_tokens: bool, data: st.DataObject
) -> None:
    tokenizer = tokenizers_by_kind[kind]
    pushes = data.draw(id_streams(tokenizer))
    whole = tokenizer.decode([token_id for push in pushes for token_id in push], skip_special_tokens=skip_special_tokens)
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    shown = ""
    for push in pushes:
        shown += detokenizer.push(push)
        assert whole.startswith(shown)
    assert shown + detokenizer.finish() == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=TEXTS)
def test_push_when_text_comes_token_by_token_then_every_piece_is_whole_characters(
    tokenizers_by_kind: dict[str, Tokenizer], kind: str, text: str
) -> None:
    tokenizer = tokenizers_by_kind[kind]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    if kind == "byte_level" and "é" not in text:  # see the added token é
        assert whole == text
    detokenizer = tokenizer.detokenizer()
    shown = ""
    for token_id in ids:
        shown += detokenizer.push([token_id])
        assert whole.startswith(shown)
    assert shown + detokenizer.finish() == whole


@settings(deadline=None)
@given(text=TEXTS)
def test_push_when_tokens_are_byte_level_then_all_complete_characters_are_shown_at_once(
    tokenizers_by_kind: dict[str, Tokenizer], text: str
) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode(text)
    shown = ""
    for end, token_id in enumerate(ids, start=1):
        shown += detokenizer.push([token_id])
        so_far = tokenizer.decode(ids[:end])
        # The text itself may have U+FFFD; beyond that, at most the one unfinished character is missing.
        assert shown == so_far or shown + REPLACEMENT == so_far


def test_push_when_the_decoder_strips_more_than_the_context_then_no_space_is_lost_or_added(
    tokenizers_by_kind: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_by_kind["byte_fallback_with_deep_strip"]
    ids = [tokenizer._tokenizer.get_vocab()[token] for token in ["▁"] * 10 + ["a"] + ["▁"] * 10 + ["a", "", "", "", "", "", "▁", "a"]]
    detokenizer = tokenizer.detokenizer()
    for end, token_id in enumerate(ids, start=1):
        assert detokenizer.push([token_id]) == tokenizer.decode(ids[:end])[len(tokenizer.decode(ids[: end - 1])) :]


def test_push_when_the_decoder_has_no_byte_fallback_then_a_token_that_looks_like_a_byte_is_shown_at_once(
    tokenizers_by_kind: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_by_kind["metaspace"]
    assert tokenizer.detokenizer().push(tokenizer.encode("<0x42>")) == "<0x42>"


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_in_sequence"])
def test_detokenizer_when_the_only_decoder_is_byte_level_then_nothing_is_decoded_again(
    tokenizers_by_kind: dict[str, Tokenizer], kind: str
) -> None:
    assert isinstance(tokenizers_by_kind[kind].detokenizer(), ByteLevelDetokenizer)


@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace", "word_piece", "word_suffix"])
def test_push_when_no_byte_run_is_open_then_the_text_is_shown_at_once(tokenizers_by_kind: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers_by_kind[kind]
    ids = tokenizer.encode("the fat cat in the  hat")
    detokenizer = tokenizer.detokenizer()
    shown = ""
    for end, token_id in enumerate(ids, start=1):
        shown += detokenizer.push([token_id])
        assert shown == tokenizer.decode(ids[:end])


def test_push_when_a_byte_run_opens_then_the_text_before_it_is_shown_and_the_run_is_held_to_its_end(
    tokenizers_by_kind: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_by_kind["byte_fallback"]
    a, run, special = tokenizer.encode("a", add_special_tokens=False), list("😀".encode()), tokenizer.encode("</s>")[1:]
    run = [1 + byte for byte in run]  # token 1 is <0x00>
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push([*a, run[0], run[1]]) == "a"
    assert detokenizer.push([*special, run[2]]) == ""  # a skipped token does not end the run
    assert detokenizer.push([run[3]]) == ""  # whole now, but another byte could spoil all of it
    assert detokenizer.push(a) == "😀 a"
    assert detokenizer.push(run[:2]) == ""
    assert detokenizer.finish() == 2 * REPLACEMENT


def test_push_when_a_special_token_is_shown_then_it_ends_the_byte_run(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["byte_fallback"]
    lead, rest = (1 + byte for byte in "é".encode())
    special = tokenizer.encode("</s>")[1:]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    assert detokenizer.push([lead, *special]) == REPLACEMENT + "</s>"
    assert detokenizer.push([rest]) + detokenizer.finish() == REPLACEMENT


@pytest.mark.parametrize("kind", KINDS)
def test_finish_when_called_then_the_detokenizer_is_as_new(tokenizers_by_kind: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers_by_kind[kind]
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode("the é 日 cat")[:-1]
    first = detokenizer.push(ids) + detokenizer.finish()
    assert detokenizer.finish() == ""
    assert detokenizer.push(ids) + detokenizer.finish() == first == tokenizer.decode(ids)


# Lead bytes, continuation bytes at the limits of what may follow them, and ASCII: the places where decoders differ.
EDGE_BYTES = st.sampled_from(list(b"a\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc2\xdf\xe0\xe1\xed\xef\xf0\xf1\xf4\xf5\xff"))


@settings(deadline=None)
@given(content=st.lists(EDGE_BYTES | st.integers(0, 255), max_size=12), cut=st.integers(0, 12))
def test_incremental_utf8_when_bytes_are_malformed_then_it_replaces_like_the_tokenizer(
    tokenizers_by_kind: dict[str, Tokenizer], content: list[int], cut: int
) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    characters = {byte: character for character, byte in byte_alphabet().items()}
    vocabulary = tokenizer._tokenizer.get_vocab()
    ids = [vocabulary[characters[byte]] for byte in content]
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    assert utf8.decode(bytes(content[:cut])) + utf8.decode(bytes(content[cut:]), final=True) == tokenizer.decode(ids)


def test_byte_alphabet_when_compared_then_it_is_that_of_the_tokenizers_package() -> None:
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


class _CountingDecode:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.lengths: list[int] = []

    def __call__(self, ids: Sequence[int]) -> str:
        self.lengths.append(len(ids))
        return self._tokenizer.decode(ids)


@pytest.mark.parametrize("token", ["▁the", "▁", REPLACEMENT, "<0x80>", "<0x80> x", "</s>"])
def test_push_when_the_stream_is_long_then_each_decode_sees_few_tokens(tokenizers_by_kind: dict[str, Tokenizer], token: str) -> None:
    tokenizer = tokenizers_by_kind["byte_fallback"]
    rust = tokenizer._tokenizer
    unit = [token_id for part in token.split() if (token_id := rust.token_to_id(part)) is not None]
    stream = (unit * 10_000)[:10_000]
    decode = _CountingDecode(tokenizer)
    hidden = {"</s>"}
    detokenizer = WindowDetokenizer(
        lambda token_id: None if rust.id_to_token(token_id) in hidden else rust.id_to_token(token_id),
        decode,
        byte_fallback=True,
        splits_characters=True,
    )
    pieces = [detokenizer.push([token_id]) for token_id in stream]
    assert max(decode.lengths, default=0) <= 2 * CONTEXT_TOKENS
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(stream)
    # The window and its tail per push; a held byte run is decoded once, at its end.
    assert sum(decode.lengths) <= 2 * (CONTEXT_TOKENS + 1) * len(stream)


def test_push_when_the_stream_is_long_and_byte_level_then_each_token_is_looked_up_once(
    tokenizers_by_kind: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    looked_up: list[int] = []

    def visible_token(token_id: int) -> str | None:
        looked_up.append(token_id)
        return tokenizer._tokenizer.id_to_token(token_id)

    stream = [(7 * index) % tokenizer.vocab_size for index in range(10_000)]
    detokenizer = ByteLevelDetokenizer(visible_token, {})
    pieces = [detokenizer.push([token_id]) for token_id in stream]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(stream, skip_special_tokens=False)
    assert looked_up == list(dict.fromkeys(stream))


@pytest.mark.parametrize("kind", KINDS)
@given(pushes=st.lists(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 400), max_size=6), max_size=6))
def test_pieces_when_ids_are_any_that_a_message_can_carry_then_they_add_up_all_the_same(
    tokenizers_by_kind: dict[str, Tokenizer], kind: str, pushes: list[list[int]]
) -> None:
    tokenizer = tokenizers_by_kind[kind]
    detokenizer = tokenizer.detokenizer()
    shown = "".join(map(detokenizer.push, pushes)) + detokenizer.finish()
    assert shown == tokenizer.decode([token_id for push in pushes for token_id in push])
