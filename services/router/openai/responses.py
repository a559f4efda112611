"""Pieces of text as OpenAI's clients read them: whole, or as server-sent events. Pure: pieces in, bytes out.

Whole    takes all pieces, then gives one body
Stream   gives the events of each piece; what is equal in all of them is encoded once for each choice
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from protos.baton.v1 import inference_pb2
from services.core.types import FinishReason, TokenLogprobs
from services.router.openai.logprobs import ChatLogprobs, CompletionColumns, CompletionLogprobs, TokenText, chat_logprobs
from services.router.openai.pieces import Piece
from services.router.request import Delta, PromptLogprobs, Summary
from services.tokenizer.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode
_QUIET = b',"logprobs":null,"finish_reason":null}]'  # what follows the text of nearly all chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """What a choice begins with: the prompt's text, and its tokens where their logprobs are wanted."""

    text: str
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What one answer looks like.

    is_chat           else a completion
    prompt_tokens     of all prompts
    num_choices       of each prompt; choice j of prompt i has the index i * num_choices + j
    echoes            one for each prompt, or none at all
    show_completion   False: the prompt alone is shown
    usage             of streams: at the end; continuous_usage: with each chunk
    """

    is_chat: bool
    id: str
    created: int
    model: str
    fingerprint: str
    num_choices: int
    num_prompts: int
    prompt_tokens: int
    with_logprobs: bool
    with_timing: bool
    echoes: Sequence[Echo] = ()
    show_completion: bool = True
    include_usage: bool = False
    continuous_usage: bool = False

    def head(self, kind: str) -> dict[str, object]:
        """The fields that all chunks of an answer have in common."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(slots=True)
class _Totals:
    """Over all prompts of an answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    timings: dict[int, inference_pb2.RequestTiming] = field(default_factory=dict)

    def add(self, prompt: int, summary: Summary, form: Form) -> None:
        self.prompt_tokens += summary.prompt_tokens
        self.cached_tokens += summary.cached_tokens
        if form.show_completion:
            self.completion_tokens += summary.completion_tokens
        self.timings[prompt] = summary.timing

    def usage(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def baton(self) -> dict[str, object]:
        """Where the time of each prompt went: the fields of RequestTiming."""
        names = [descriptor.name for descriptor in inference_pb2.RequestTiming.DESCRIPTOR.fields]
        return {"timings": [{name: getattr(timing, name) for name in names} for _, timing in sorted(self.timings.items())]}


class _Logprobs:
    """Writes logprobs in the answer's form; the columns of completions go on from piece to piece."""

    def __init__(self, form: Form, tokenizer: Tokenizer, text_of: Callable[[int], TokenText]) -> None:
        self._form = form
        self._text_of = text_of
        self._scored: set[int] = set()
        self._columns = (
            [CompletionColumns(tokenizer, text_of) for _ in range(form.num_prompts * form.num_choices)]
            if form.with_logprobs and not form.is_chat
            else []
        )

    def of_delta(self, index: int, delta: Delta) -> CompletionLogprobs | ChatLogprobs | None:
        if not self._form.with_logprobs:
            return None
        if self._form.is_chat:
            return chat_logprobs(self._text_of, delta.token_ids, delta.logprobs)
        return self._columns[index].add(delta.token_ids, delta.logprobs)

    def of_prompt(self, index: int, echo: Echo, logprobs: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        self._scored.add(index)
        return self._columns[index].add(echo.token_ids, (None, *logprobs))

    def check_scored(self, prompt: int) -> None:
        """generate() has given what was asked for: an answer without the prompt's scores would be taken for one with them."""
        assert not (self._form.echoes and self._form.with_logprobs) or prompt * self._form.num_choices in self._scored


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    completion: CompletionLogprobs = field(default_factory=CompletionLogprobs)
    chat: ChatLogprobs = field(default_factory=ChatLogprobs)
    finish_reason: FinishReason | None = None

    def add(self, logprobs: CompletionLogprobs | ChatLogprobs | None) -> None:
        if isinstance(logprobs, ChatLogprobs):
            self.chat.content += logprobs.content
        elif logprobs is not None:
            for name in CompletionLogprobs.__struct_fields__:
                getattr(self.completion, name).extend(getattr(logprobs, name))


class Whole:
    """The answer in one body."""

    def __init__(self, form: Form, tokenizer: Tokenizer, text_of: Callable[[int], TokenText]) -> None:
        self._form = form
        self._logprobs = _Logprobs(form, tokenizer, text_of)
        self._totals = _Totals()
        self._choices = [_Choice() for _ in range(form.num_prompts * form.num_choices)]
        for index, choice in enumerate(self._choices):
            if form.echoes:
                choice.text.append(form.echoes[index // form.num_choices].text)

    def take(self, prompt: int, piece: Piece) -> None:
        first = prompt * self._form.num_choices
        if isinstance(piece, Summary):
            self._logprobs.check_scored(prompt)
            self._totals.add(prompt, piece, self._form)
        elif isinstance(piece, PromptLogprobs):
            for index in range(first, first + self._form.num_choices):
                self._choices[index].add(self._logprobs.of_prompt(index, self._form.echoes[prompt], piece.logprobs))
        else:
            index = first + piece.choice
            choice = self._choices[index]
            choice.finish_reason = piece.finish_reason
            if self._form.show_completion:
                choice.text.append(piece.text)
                choice.add(self._logprobs.of_delta(index, piece))

    def body(self) -> bytes:
        form, totals = self._form, self._totals
        choices: list[dict[str, object]] = []
        for index, choice in enumerate(self._choices):
            text = "".join(choice.text)
            logprobs = (choice.chat if form.is_chat else choice.completion) if form.with_logprobs else None
            shown: dict[str, object] = (
                {"message": {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}} if form.is_chat else {"text": text}
            )
            choices.append({"index": index, **shown, "logprobs": logprobs, "finish_reason": _reason(choice.finish_reason)})
        answer: dict[str, Any] = form.head("chat.completion" if form.is_chat else "text_completion")
        answer |= {"choices": choices, "usage": totals.usage()}
        if form.with_timing:
            answer["baton"] = totals.baton()
        return _encode(answer)


class Stream:
    """The answer as events."""

    def __init__(self, form: Form, tokenizer: Tokenizer, text_of: Callable[[int], TokenText]) -> None:
        self._form = form
        self._logprobs = _Logprobs(form, tokenizer, text_of)
        self._totals = _Totals()
        self._shown_tokens = 0
        self._is_open = [False] * form.num_prompts
        head = _encode(form.head("chat.completion.chunk" if form.is_chat else "text_completion"))[:-1]
        self._head = b"data: " + head + b',"choices":['
        opening, self._closing = (b',"delta":{"content":', b"}") if form.is_chat else (b',"text":', b"")
        self._heads = [b'%s{"index":%d%s' % (self._head, index, opening) for index in range(form.num_prompts * form.num_choices)]
        self._quiet_end = self._closing + _QUIET + self._usage() + b"}\n\n"

    def events(self, prompt: int, piece: Piece) -> bytes:
        """Those of one piece; may be none."""
        form = self._form
        if not self._is_open[prompt]:
            return self._opening(prompt, piece)
        if isinstance(piece, Delta):
            index = prompt * form.num_choices + piece.choice
            if not form.show_completion:
                return b"" if piece.finish_reason is None else self._chunk(index, "", None, piece.finish_reason)
            if form.continuous_usage:
                self._shown_tokens += len(piece.token_ids)
            elif not form.with_logprobs and piece.finish_reason is None:
                # Once for each token of nearly every stream.
                return self._heads[index] + _encode(piece.text) + self._quiet_end if piece.text else b""
            return self._chunk(index, piece.text, self._logprobs.of_delta(index, piece), piece.finish_reason)
        if isinstance(piece, Summary):
            self._logprobs.check_scored(prompt)
            self._totals.add(prompt, piece, form)
        return b""

    def end(self) -> bytes:
        """After the last piece: usage and timings, if they are wanted, and the word that this was all."""
        form, totals = self._form, self._totals
        if not form.include_usage and not form.with_timing:
            return DONE
        rest: dict[str, object] = {"usage": totals.usage()} if form.include_usage else {}
        if form.with_timing:
            rest["baton"] = totals.baton()
        return self._head + b"]," + _encode(rest)[1:] + b"\n\n" + DONE

    def _opening(self, prompt: int, piece: Piece) -> bytes:
        """What comes before the first text of a prompt's choices: the role of a chat, the echo of a completion."""
        form = self._form
        self._is_open[prompt] = True
        indices = range(prompt * form.num_choices, (prompt + 1) * form.num_choices)
        events = b""
        if form.is_chat:
            role = b'{"role":"assistant","content":""}' + _QUIET + self._usage() + b"}\n\n"
            events = b"".join(b'%s{"index":%d,"delta":%s' % (self._head, index, role) for index in indices)
        elif form.echoes:
            echo = form.echoes[prompt]
            for index in indices:
                logprobs = self._logprobs.of_prompt(index, echo, piece.logprobs) if isinstance(piece, PromptLogprobs) else None
                events += self._chunk(index, echo.text, logprobs, None)
        return events if isinstance(piece, PromptLogprobs) else events + self.events(prompt, piece)

    def _chunk(
        self, index: int, text: str, logprobs: CompletionLogprobs | ChatLogprobs | None, finish_reason: FinishReason | None
    ) -> bytes:
        return b'%s%s%s,"logprobs":%s,"finish_reason":%s}]%s}\n\n' % (
            self._heads[index],
            _encode(text),
            self._closing,
            _encode(logprobs),
            _encode(_reason(finish_reason)),
            self._usage(),
        )

    def _usage(self) -> bytes:
        form = self._form
        if form.continuous_usage:
            prompt_tokens = form.prompt_tokens
            usage = {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": self._shown_tokens,
                "total_tokens": prompt_tokens + self._shown_tokens,
            }
            return b',"usage":' + _encode(usage)
        return b',"usage":null' if form.include_usage else b""


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
