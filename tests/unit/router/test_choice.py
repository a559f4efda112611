"""Stop strings and hold-back, against the plain definition: the text up to the first stop string, whatever the pieces were."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import InvalidRequest
from services.core.types import FinishReason
from services.router.choice import MAX_STOP_CHARACTERS, MAX_STOPS, ChoiceText, check_stops


class Letters:
    """A detokenizer whose token i is the i-th of a few strings; it holds one token back, as real ones do with half characters."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._held = ""

    def push(self, token_ids: Sequence[int]) -> str:
        whole = [self._held] + [self._texts[token_id] for token_id in token_ids]
        self._held = whole.pop()
        return "".join(whole)

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def expected(texts: Sequence[str], stop: Sequence[str]) -> tuple[str, bool]:
    """Text before the stop string that is complete first; of those, the one that begins first."""
    whole = ""
    for character in "".join(texts):
        whole += character
        starts = [len(whole) - len(word) for word in stop if whole.endswith(word)]
        if starts:
            return whole[: min(starts)], True
    return whole, False


words = st.text(alphabet="ab", min_size=1, max_size=3)


@given(texts=st.lists(words, min_size=1, max_size=12), stop=st.lists(words, max_size=3), data=st.data())
def test_text_when_cut_into_any_pieces_ends_before_the_first_stop_string(texts: list[str], stop: list[str], data: st.DataObject) -> None:
    choice = ChoiceText(Letters(texts), stop=stop)
    shown = ""
    at = 0
    finish_reason = None
    while at < len(texts) and finish_reason is None:
        size = data.draw(st.integers(1, len(texts) - at))
        at += size
        result = choice.push(range(at - size, at), FinishReason.LENGTH if at == len(texts) else None)
        assert result.num_tokens <= size
        shown += result.text
        finish_reason = result.finish_reason
    # Characters of one token come at once: a longer stop string that begins earlier in the same token may win, or an earlier one.
    text, stopped = expected(texts, stop)
    assert (finish_reason is FinishReason.STOP) == stopped
    if not stopped:
        assert shown == text
    else:
        whole = "".join(texts)
        assert whole.startswith(shown)
        assert any(whole[len(shown) :].startswith(word) for word in stop)
        assert len(shown) <= len(text)


def test_text_when_a_stop_string_may_be_coming_is_held_back() -> None:
    choice = ChoiceText(Letters(["one", " ST", "OP", " two", ""]), stop=[" STOP"])
    assert [choice.push([token_id], None).text for token_id in (0, 1, 2)] == ["", "one", ""]
    last = choice.push([3], None)
    assert (last.text, last.finish_reason) == ("", FinishReason.STOP)


def test_text_when_held_back_in_vain_is_shown_at_the_end() -> None:
    choice = ChoiceText(Letters(["a", " ST"]), stop=[" STOP"])
    assert choice.push([0], None).text == ""
    assert choice.push([1], FinishReason.LENGTH).text == "a ST"


def test_end_token_when_it_ends_the_choice_is_counted_but_not_shown() -> None:
    choice = ChoiceText(Letters(["a", "<end>"]))
    result = choice.push([0, 1], FinishReason.STOP)
    assert (result.text, result.num_tokens, result.finish_reason) == ("a", 2, FinishReason.STOP)


def test_stop_string_when_it_ends_before_min_tokens_is_text() -> None:
    choice = ChoiceText(Letters(["x", "x", "x", "x", ""]), stop=["x"], min_tokens=2)
    results = [choice.push([token_id], None) for token_id in range(3)]
    # Letters shows a token when the next one comes, so that the first x is text by min_tokens and the second one ends the choice.
    assert [(result.text, result.finish_reason) for result in results] == [("", None), ("x", None), ("", FinishReason.STOP)]


@pytest.mark.parametrize("stop", [[""], ["x" * (MAX_STOP_CHARACTERS + 1)], ["x"] * (MAX_STOPS + 1)])
def test_stops_when_out_of_their_limits_are_refused(stop: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="stop"):
        check_stops(stop)
    check_stops(["x"] * MAX_STOPS)
