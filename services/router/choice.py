"""The text of one choice while its tokens come in: detokenized as it grows, held back where it might become a stop string.

Knows nothing of workers: a choice that continues elsewhere keeps its state here, so that nothing is shown twice and no stop string is
missed across the seam.
"""

from collections.abc import Sequence
from typing import NamedTuple

from services.core.errors import InvalidRequest
from services.core.types import FinishReason
from services.tokenizer.detokenizer import Detokenizer

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024


def check_stops(stop: Sequence[str]) -> None:
    """Raises InvalidRequest when there are too many stop strings, or one is empty or too long."""
    check_num_stops(len(stop))
    for text in stop:
        if not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest("stop", f"a string has {len(text)} characters, not 1 … {MAX_STOP_CHARACTERS}", limit=MAX_STOP_CHARACTERS)


def check_num_stops(num_stops: int) -> None:
    """Raises InvalidRequest when there are too many stop strings."""
    if num_stops > MAX_STOPS:
        raise InvalidRequest("stop", f"has {num_stops} strings; at most {MAX_STOPS} are taken", limit=MAX_STOPS)


class Shown(NamedTuple):  # one for each token
    """What a few tokens made final: text to show, how many of the tokens belong to the choice, and why it has ended, if it has."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None


class ChoiceText:
    """State of one choice. After a Shown with a finish_reason it takes no more tokens."""

    def __init__(self, detokenizer: Detokenizer, *, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""  # detokenized, may be the start of a stop string
        self._unstoppable = 0  # leading characters of _held that came before min_tokens: no stop string may end there

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> Shown:
        """Takes the next tokens; `finish_reason` says why the engine ended the choice with the last of them."""
        if not self._stop and finish_reason is None:
            self._num_tokens += len(token_ids)
            return Shown(self._detokenizer.push(token_ids), len(token_ids), None)
        text = ""
        for index, token_id in enumerate(token_ids):
            self._num_tokens += 1
            is_end_token = finish_reason is FinishReason.STOP and index == len(token_ids) - 1
            # The token that ends a choice is no part of its text, whether it is the checkpoint's own or the request's.
            piece = "" if is_end_token else self._detokenizer.push([token_id])
            shown, stopped = self._take(piece)
            text += shown
            if stopped:
                return Shown(text=text, num_tokens=index + 1, finish_reason=FinishReason.STOP)
        if finish_reason is not None:
            shown, stopped = self._take(self._detokenizer.finish())
            text += shown
            if stopped:
                finish_reason = FinishReason.STOP
            else:
                text += self._held
        return Shown(text=text, num_tokens=len(token_ids), finish_reason=finish_reason)

    def _take(self, piece: str) -> tuple[str, bool]:
        """Adds text; returns what may be shown of it, and whether a stop string has ended the choice."""
        if not self._stop:
            return piece, False
        old = len(self._held)
        text = self._held + piece
        if self._num_tokens <= self._min_tokens:
            self._unstoppable = len(text)
        # A stop string that ended in the old text would have been found then.
        starts = [text.find(stop, max(0, old - len(stop) + 1, self._unstoppable - len(stop) + 1)) for stop in self._stop]
        found = [start for start in starts if start >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = next((size for size in range(min(self._longest - 1, len(text)), 0, -1) if self._may_begin(text[-size:])), 0)
        self._held = text[len(text) - keep :]
        self._unstoppable = max(0, self._unstoppable - (len(text) - keep))
        return text[: len(text) - keep], False

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stop)
