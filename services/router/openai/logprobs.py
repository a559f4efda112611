"""Log-probabilities in the two forms that OpenAI gave them: columns for completions, one object for each token for chats."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from services.core.types import TokenLogprobs
from services.tokenizer.tokenizer import Tokenizer

# JSON has no infinity; the same floor as vLLM's.
MIN_LOGPROB = -9999.0


class CompletionLogprobs(msgspec.Struct):
    """Entry i of each column is of token i; `text_offset` counts characters of the choice's text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class _Alternative(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[_Alternative]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob] = []
    refusal: None = None


class TokenText(NamedTuple):
    """How one token is shown, and the bytes that it stands for."""

    text: str
    data: bytes


def token_texts(tokenizer: Tokenizer) -> Callable[[int], TokenText]:
    """Remembers every token that it was asked for: at most the vocabulary."""
    known: dict[int, TokenText] = {}

    def text_of(token_id: int) -> TokenText:
        if token_id not in known:
            data = tokenizer.token_bytes(token_id)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                # Part of a character: OpenAI's way to write what no string can say.
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            known[token_id] = TokenText(text, data)
        return known[token_id]

    return text_of


class CompletionColumns:
    """Makes the columns of one choice, piece by piece: the offsets go on from what was shown before."""

    def __init__(self, tokenizer: Tokenizer, text_of: Callable[[int], TokenText]) -> None:
        self._text_of = text_of
        self._detokenizer = tokenizer.detokenizer()
        self._offset = 0

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """None: the first token of a prompt, which nothing comes before."""
        columns = CompletionLogprobs()
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            text = self._text_of(token_id).text
            columns.tokens.append(text)
            columns.text_offset.append(self._offset)
            self._offset += len(self._detokenizer.push([token_id]))
            columns.token_logprobs.append(None if entry is None else _finite(entry.chosen))
            columns.top_logprobs.append(None if entry is None else self._top(text, entry))
        return columns

    def _top(self, text: str, entry: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in entry.top:
            top.setdefault(self._text_of(token_id).text, _finite(logprob))  # of tokens that look alike, the best
        top.setdefault(text, _finite(entry.chosen))
        return top


def chat_logprobs(text_of: Callable[[int], TokenText], token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
    content = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        text, data = text_of(token_id)
        top = []
        for other_id, logprob in entry.top:
            other = text_of(other_id)
            top.append(_Alternative(other.text, _finite(logprob), list(other.data)))
        content.append(ChatTokenLogprob(text, _finite(entry.chosen), list(data), top))
    return ChatLogprobs(content)


def _finite(logprob: float) -> float:
    return max(MIN_LOGPROB, logprob)
