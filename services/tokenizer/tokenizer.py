"""The tokenizer of a checkpoint: text to token ids and back, and chat messages to a prompt.

The only file that knows the `tokenizers` package. Does not know the model: ids that the vocabulary lacks decode to nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import tokenizers

from services.core.errors import CheckpointError, InvalidRequest
from services.tokenizer.chat_template import ChatTemplate, NamedTemplate
from services.tokenizer.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer, byte_of


class _AddedToken(msgspec.Struct):
    content: str


class _SpecialTokens(msgspec.Struct):
    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    unk_token: str | _AddedToken | None = None
    sep_token: str | _AddedToken | None = None
    pad_token: str | _AddedToken | None = None
    cls_token: str | _AddedToken | None = None
    mask_token: str | _AddedToken | None = None

    def by_name(self) -> dict[str, str]:
        tokens = {name: getattr(self, name) for name in _SpecialTokens.__struct_fields__}
        return {name: token if isinstance(token, str) else token.content for name, token in tokens.items() if token is not None}


class _TokenizerConfig(_SpecialTokens):
    chat_template: str | list[NamedTemplate] | None = None
    added_tokens_decoder: msgspec.Raw = msgspec.Raw()  # only whether it is there


class _Decoder(msgspec.Struct):
    type: str = ""
    decoders: list["_Decoder"] = []

    def steps(self) -> list[str]:
        return [step for decoder in self.decoders for step in decoder.steps()] if self.type == "Sequence" else [self.type]


class _TokenizerFile(msgspec.Struct):
    decoder: _Decoder | None = None


class Tokenizer:
    """Encodes and decodes with the files of one checkpoint; threads may share it."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        decoder_steps: Sequence[str],
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder_steps = tuple(decoder_steps)
        self._special_tokens = dict(special_tokens)
        self._chat_template = chat_template
        self._token_bytes: dict[bool, dict[int, bytes]] = {True: {}, False: {}}  # by skip_special_tokens; detokenizers fill them
        self._max_token_characters = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
        self._hidden_tokens = frozenset(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)

    @classmethod
    def from_checkpoint(cls, directory: Path) -> "Tokenizer":
        """Reads tokenizer.json, and if present tokenizer_config.json, special_tokens_map.json and the template files.

        Raises CheckpointError if tokenizer.json is missing, if a file is broken, or if bos or eos are not in the vocabulary.
        """
        path = directory / "tokenizer.json"
        try:
            content = path.read_bytes()
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
            decoder = msgspec.json.decode(content, type=_TokenizerFile).decoder
        except OSError as error:
            raise CheckpointError("cannot read the tokenizer", path=str(path)) from error
        except Exception as error:  # `tokenizers` raises plain Exception for a file that it cannot parse
            raise CheckpointError(f"not a tokenizer: {error}", path=str(path)) from error
        # Limits saved by whoever trained it: left on, they would silently cut prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_optional(directory / "tokenizer_config.json", _TokenizerConfig)
        from_map = _read_optional(directory / "special_tokens_map.json", _SpecialTokens).by_name()
        # Older checkpoints lack added_tokens_decoder; for them transformers lets the map win.
        special_tokens = from_map | config.by_name() if config.added_tokens_decoder else config.by_name() | from_map
        for name in ("bos_token", "eos_token"):
            if name in special_tokens and tokenizer.token_to_id(special_tokens[name]) is None:
                raise CheckpointError(f"{name} {special_tokens[name]!r} is not in tokenizer.json", path=str(directory))
        return cls(
            tokenizer,
            decoder_steps=decoder.steps() if decoder else (),
            special_tokens=special_tokens,
            chat_template=ChatTemplate.from_checkpoint(directory, config.chat_template),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the logits of a model may be wider."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def max_token_characters(self) -> int:
        """Characters of the longest token: a text has at least its length over this in tokens."""
        return self._max_token_characters

    @property
    def bos_token_id(self) -> int | None:
        """None if the checkpoint names no such token."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """None if the checkpoint names no such token; generation_config.json may name more."""
        return self._special_id("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of the text; special tokens written out in it become their ids.

        Raises InvalidRequest if the text has an unpaired surrogate, which JSON can carry and UTF-8 cannot.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise InvalidRequest("text", "not valid Unicode (an unpaired surrogate)") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; those outside the vocabulary are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for within a text, special tokens included; empty for an id outside the vocabulary."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._decoder_steps == ("ByteLevel",):
            return ByteLevelDetokenizer(lambda _: token, {}).token_bytes(token_id)
        if "ByteFallback" in self._decoder_steps and (byte := byte_of(token)) is not None:
            return bytes([byte])
        # Decoders treat the start of a text otherwise, by stripping a space above all: what the token adds behind itself is what it is.
        return self.decode([token_id, token_id], skip_special_tokens=False)[
            len(self.decode([token_id], skip_special_tokens=False)) :
        ].encode()

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A new detokenizer for one sequence; its pieces add up to `decode` of the whole."""

        def visible_token(token_id: int) -> str | None:
            token = self._tokenizer.id_to_token(token_id)
            # By text, not by id, as `decode` does it: a special token that the normalizer changes stays visible.
            return None if skip_special_tokens and token in self._hidden_tokens else token

        def decode(ids: Sequence[int]) -> str:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

        if self._decoder_steps == ("ByteLevel",):
            return ByteLevelDetokenizer(visible_token, self._token_bytes[skip_special_tokens])
        return WindowDetokenizer(
            visible_token,
            decode,
            byte_fallback="ByteFallback" in self._decoder_steps,
            splits_characters="ByteLevel" in self._decoder_steps,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for a conversation; encode it without special tokens, for the template writes them itself.

        `variables` are further names for the template; they win over the special tokens.
        Raises InvalidRequest if the checkpoint has no template or the template does not take the messages.
        """
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            variables={**self._special_tokens, **(variables or {})},
        )

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)


_File = TypeVar("_File", bound=msgspec.Struct)


def _read_optional(path: Path, kind: type[_File]) -> _File:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return kind()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read it: {error}", path=str(path)) from error
