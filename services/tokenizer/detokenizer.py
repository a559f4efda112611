"""Turns a stream of token ids into text while it grows, without ever showing half a character.

Does not know the tokenizer: it gets functions that name one token and decode a few. All pieces of a stream together
equal the decode of all its ids at once, and a push costs only its own tokens, however long the stream already is.

    ByteLevelDetokenizer   every token stands for fixed bytes (GPT-2, Llama 3, Qwen): an incremental UTF-8 decoder is enough
    WindowDetokenizer      any other decoder (Llama 2, Metaspace, WordPiece): decodes a short window again, shows what is new

Source: the decoders of https://github.com/huggingface/tokenizers (tokenizers/src/decoders, pre_tokenizers/byte_level.rs);
the byte alphabet is that of https://github.com/openai/gpt-2/blob/master/src/encoder.py.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

# A window must hold a whole unfinished character and the space that a decoder strips at the start: four tokens do.
CONTEXT_TOKENS = 4
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    """State of one growing sequence; not thread-safe."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make final; the rest is held back."""

    def finish(self) -> str:
        """The text held back, now that nothing follows; afterwards the detokenizer is as new."""


class ByteLevelDetokenizer:
    """For tokenizers whose only decoder is ByteLevel.

    visible_token   visible_token(token_id) is the text of the token in the vocabulary, or None if the token is not to be shown
    known           bytes of tokens already met, to be shared by all sequences of a vocabulary: looking one up costs ten times as much
    """

    def __init__(self, visible_token: Callable[[int], str | None], known: dict[int, bytes]) -> None:
        self._visible_token = visible_token
        self._known = known
        # It replaces malformed bytes exactly like Rust's `from_utf8_lossy`: one U+FFFD per maximal malformed part.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_whole = True  # it holds nothing back

    def push(self, token_ids: Sequence[int]) -> str:
        known = self._known
        for token_id in token_ids:
            if token_id not in known:
                known[token_id] = self.token_bytes(token_id)
        piece = b"".join([known[token_id] for token_id in token_ids])
        if self._is_whole:
            try:
                return piece.decode()  # nearly always; the incremental decoder is written in Python
            except UnicodeDecodeError:
                pass
        text = self._utf8.decode(piece)
        self._is_whole = not self._utf8.getstate()[0]
        return text

    def finish(self) -> str:
        self._is_whole = True
        return self._utf8.decode(b"", final=True)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for; it is not remembered."""
        token = self._visible_token(token_id)
        if token is None:
            return b""
        byte_of = byte_alphabet()
        try:
            return bytes([byte_of[character] for character in token])
        except KeyError:
            # One foreign character (a space in an added token) makes the whole token plain text.
            return token.encode()


class WindowDetokenizer:
    """For every other decoder: shows decode(window + new tokens) beyond what it has shown of the window.

    visible_token        as for ByteLevelDetokenizer
    decode               text of a few visible token ids, by the rules of the tokenizer
    byte_fallback        the decoder has tokens like <0xE2>: a run of them becomes one U+FFFD per token unless the run as a
                         whole is UTF-8, so nothing of a run is certain before another visible token has ended it
    splits_characters    the decoder joins the bytes of neighboring tokens, so a U+FFFD at the end may still become a character
    """

    def __init__(
        self,
        visible_token: Callable[[int], str | None],
        decode: Callable[[Sequence[int]], str],
        *,
        byte_fallback: bool,
        splits_characters: bool,
    ) -> None:
        self._visible_token = visible_token
        self._decode = decode
        self._byte_fallback = byte_fallback
        self._splits_characters = splits_characters
        self._reset()

    def _reset(self) -> None:
        # Tokens of the stream:  [ forgotten | window, its text shown up to `shown` characters | byte run, nothing shown ]
        self._window: list[int] = []
        self._byte_run: list[int] = []
        self._shown = 0

    def push(self, token_ids: Sequence[int]) -> str:
        window_grew = False
        for token_id in token_ids:
            token = self._visible_token(token_id)
            if token is None:  # left out before the decoder runs, so it does not end a byte run either
                continue
            self._byte_run.append(token_id)
            if not (self._byte_fallback and _looks_like_byte(token)):
                self._window += self._byte_run
                self._byte_run = []
                window_grew = True
        return self._show() if window_grew else ""

    def finish(self) -> str:
        piece = self._decode(self._window + self._byte_run)[self._shown :]
        self._reset()
        return piece

    def _show(self) -> str:
        text = self._decode(self._window)
        # Only the last U+FFFD is open: an unfinished character is one of them, and those before it have been followed by more.
        num_held = int(self._splits_characters and text.endswith(REPLACEMENT))
        end = len(text) - num_held
        piece = text[self._shown : end]
        self._shown = end
        tail = self._window[-CONTEXT_TOKENS:]
        tail_text = self._decode(tail)
        # A tail that decodes to nothing may not have used up what the decoder strips at the start of a text.
        if tail_text:
            self._window = tail
            self._shown = len(tail_text) - num_held
        return piece


@cache
def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for: itself if printable, else U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def byte_of(token: str) -> int | None:
    """The byte that a token like <0xE2> stands for where the decoder has a byte fallback; None for any other token."""
    return int(token[3:5], 16) if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token) else None


def _looks_like_byte(token: str) -> bool:
    # Wider than the rule of the decoder (hex digits between): holding back a token too many only delays it.
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
