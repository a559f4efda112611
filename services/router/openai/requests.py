"""Bodies of requests as OpenAI and vLLM write them → what Baton understands. Pure: bytes in, a value or InvalidRequest out.

Fields that nobody knows are ignored, as vLLM does. Fields that would change the answer and are not served are refused by name, unless
their value says that they are not wanted.
"""

import re
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from protos.baton.v1 import common_pb2
from services.core.errors import InvalidRequest
from services.core.noise import MAX_SEED
from services.core.types import MAX_LOGPROBS
from services.mesh.convert import MAX_U32

MAX_PROMPTS = 128
MAX_CHOICES_OF_ALL = 1024
DEFAULT_COMPLETION_TOKENS = 16
MIN_SEED = -(2**63)
# Of messages, stop tokens and biases: more would only keep the processor busy.
MAX_ENTRIES = 1 << 17

_PATH = re.compile(r" - at (?:`(?:key|value)` in )?`\$\.?(?P<path>[^`]*)`$")


class _StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Body(msgspec.Struct, kw_only=True):
    """What completions and chats have in common. None: not given."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    baton_timing: bool | None = None
    # Not served, as all fields of type Any: see _refuse_unserved.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    use_beam_search: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    logits_processors: Any = None
    prompt_logprobs: Any = None
    truncate_prompt_tokens: Any = None
    include_stop_str_in_output: Any = None
    skip_special_tokens: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    kv_transfer_params: Any = None
    priority: Any = None
    lora_request: Any = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[int | str | list[int]] | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Any = None
    prompt_embeds: Any = None


class _ChatBody(_Body, kw_only=True):
    messages: list[dict[str, Any]] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: str | None = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    chat_template: Any = None
    continue_final_message: Any = None
    echo: Any = None


class _TokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class _DetokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[int] | None = None


# Values with which a field that is not served asks for nothing; of fields that are not listed: null, false, 0, "" and what is empty.
_UNWANTED: Mapping[str, Sequence[object]] = {
    "response_format": (None, {"type": "text"}),
    "skip_special_tokens": (None, True),
    "modalities": (None, ["text"]),
    "tool_choice": (None, "auto", "none"),
    "function_call": (None, "auto", "none"),
}
_NOTHING: Sequence[object] = (None, False, 0, "", [], {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of completions and chats alike; `sampling` has the fields that the request gave, and no others."""

    model: str
    sampling: common_pb2.SamplingParams
    stop: tuple[str, ...]
    cache_salt: bytes
    request_id: str | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    with_timing: bool

    @property
    def num_choices(self) -> int:
        return self.sampling.n if self.sampling.HasField("n") else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """
    prompts           texts, or token ids
    echo              the text begins with the prompt's
    show_completion   False: only the prompt is wanted, for its logprobs
    """

    options: Options
    prompts: list[str] | list[list[int]]
    add_special_tokens: bool
    echo: bool
    show_completion: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """`variables` are the template's; `num_characters` is about how long all of it is."""

    options: Options
    messages: Sequence[Mapping[str, object]]
    tools: Sequence[Mapping[str, object]] | None
    documents: Sequence[Mapping[str, object]] | None
    variables: Mapping[str, object]
    add_generation_prompt: bool
    add_special_tokens: bool
    num_characters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenize:
    """A text, or messages."""

    model: str
    prompt: str | None
    messages: Sequence[Mapping[str, object]]
    tools: Sequence[Mapping[str, object]] | None
    variables: Mapping[str, object]
    add_special_tokens: bool
    add_generation_prompt: bool
    with_token_strings: bool
    num_characters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Detokenize:
    model: str
    tokens: Sequence[int]


def parse_completion(data: bytes) -> Completion:
    """Raises InvalidRequest."""
    body = _decode(data, _COMPLETION)
    _refuse_unserved(body)
    if body.best_of is not None and body.best_of != (1 if body.n is None else body.n):
        raise InvalidRequest("best_of", f"{body.best_of} is not n; all choices are returned", limit=body.n or 1)
    echo = bool(body.echo)
    show_completion = not (echo and body.max_tokens == 0)
    options = _options(body, max_tokens=body.max_tokens if show_completion else 1, logprobs=body.logprobs)
    prompts = _prompts(body.prompt)
    num_choices = len(prompts) * options.num_choices
    if num_choices > MAX_CHOICES_OF_ALL:
        message = f"{len(prompts)} prompts of {options.num_choices} choices each are more than {MAX_CHOICES_OF_ALL} choices"
        raise InvalidRequest("n", message, limit=MAX_CHOICES_OF_ALL)
    return Completion(
        options=options,
        prompts=prompts,
        add_special_tokens=body.add_special_tokens is not False,
        echo=echo,
        show_completion=show_completion,
    )


def parse_chat(data: bytes) -> Chat:
    """Raises InvalidRequest."""
    body = _decode(data, _CHAT)
    _refuse_unserved(body)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs: true")
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    return Chat(
        options=_options(
            body,
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            max_tokens_field="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            logprobs_field="top_logprobs",
        ),
        messages=_messages(body.messages),
        tools=body.tools,
        documents=body.documents,
        variables=variables,
        add_generation_prompt=body.add_generation_prompt is not False,
        add_special_tokens=bool(body.add_special_tokens),
        num_characters=len(data),
    )


def parse_tokenize(data: bytes) -> Tokenize:
    """Raises InvalidRequest."""
    body = _decode(data, _TOKENIZE)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt", "give either prompt or messages")
    return Tokenize(
        model=body.model or "",
        prompt=body.prompt,
        messages=() if body.messages is None else _messages(body.messages),
        tools=body.tools,
        variables=body.chat_template_kwargs or {},
        # A template writes the special tokens itself.
        add_special_tokens=(body.messages is None) if body.add_special_tokens is None else body.add_special_tokens,
        add_generation_prompt=body.add_generation_prompt is not False,
        with_token_strings=bool(body.return_token_strs),
        num_characters=len(data),
    )


def parse_detokenize(data: bytes) -> Detokenize:
    """Raises InvalidRequest."""
    body = _decode(data, _DETOKENIZE)
    if body.tokens is None:
        raise InvalidRequest("tokens", "is missing")
    return Detokenize(model=body.model or "", tokens=body.tokens)


_NOT_SERVED: Mapping[type[_Body], Sequence[str]] = {
    _CompletionBody: [name for name, hint in typing.get_type_hints(_CompletionBody).items() if hint is Any],
    _ChatBody: [name for name, hint in typing.get_type_hints(_ChatBody).items() if hint is Any],
}
_Kind = TypeVar("_Kind", bound=msgspec.Struct)
_COMPLETION = msgspec.json.Decoder(_CompletionBody)
_CHAT = msgspec.json.Decoder(_ChatBody)
_TOKENIZE = msgspec.json.Decoder(_TokenizeBody)
_DETOKENIZE = msgspec.json.Decoder(_DetokenizeBody)


def _decode(data: bytes, decoder: "msgspec.json.Decoder[_Kind]") -> _Kind:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        text = str(error)
        place = _PATH.search(text)
        raise InvalidRequest(place["path"] if place and place["path"] else "body", _PATH.sub("", text)) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest("body", f"is not JSON: {error}") from None
    except UnicodeDecodeError:
        raise InvalidRequest("body", "is not UTF-8") from None
    except RecursionError:
        raise InvalidRequest("body", "is nested too deeply") from None


def _refuse_unserved(body: _Body) -> None:
    for name in _NOT_SERVED[type(body)]:
        value = getattr(body, name)
        # By type, too: true is not 1 here.
        if not any(type(value) is type(harmless) and value == harmless for harmless in _UNWANTED.get(name, _NOTHING)):
            raise InvalidRequest(name, "is not supported here; leave it out")


def _options(
    body: _Body,
    *,
    max_tokens: int | None,
    max_tokens_field: str = "max_tokens",
    logprobs: int | None,
    logprobs_field: str = "logprobs",
) -> Options:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "needs stream: true")
    usage = body.stream_options or _StreamOptions()
    _check_length("stop_token_ids", body.stop_token_ids or ())
    _check_length("logit_bias", body.logit_bias or ())
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(logprobs_field, f"{logprobs} is outside [0, {MAX_LOGPROBS}]", limit=MAX_LOGPROBS)
    sampling = common_pb2.SamplingParams(
        # Absent is not 0: the checkpoint's own default is meant.
        temperature=body.temperature,
        top_p=body.top_p,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        top_k=_u32("top_k", 0 if body.top_k == -1 else body.top_k),  # vLLM's way to say: all
        n=_u32("n", body.n),
        min_tokens=_u32("min_tokens", body.min_tokens),
        max_tokens=_u32(max_tokens_field, max_tokens),
        logprobs=logprobs,
        seed=_seed(body.seed),
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=[_needed_u32("stop_token_ids", token_id) for token_id in body.stop_token_ids or ()],
        logit_bias={_needed_u32("logit_bias", token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
    )
    return Options(
        model=body.model or "",
        sampling=sampling,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        cache_salt=(body.cache_salt or "").encode(),
        request_id=body.request_id,
        stream=bool(body.stream),
        include_usage=bool(usage.include_usage),
        continuous_usage=bool(usage.include_usage and usage.continuous_usage_stats),
        with_timing=bool(body.baton_timing),
    )


def _check_length(field: str, entries: Collection[object]) -> None:
    if len(entries) > MAX_ENTRIES:
        raise InvalidRequest(field, f"has {len(entries)} entries; at most {MAX_ENTRIES} are taken", limit=MAX_ENTRIES)


def _u32(field: str, value: int | None) -> int | None:
    return None if value is None else _needed_u32(field, value)


def _needed_u32(field: str, value: int) -> int:
    if not 0 <= value <= MAX_U32:
        raise InvalidRequest(field, f"{value} is outside [0, {MAX_U32}]", limit=MAX_U32)
    return value


def _seed(seed: int | None) -> int | None:
    """Clients send 64 bits with a sign, or without."""
    if seed is None:
        return None
    if not MIN_SEED <= seed <= MAX_SEED:
        raise InvalidRequest("seed", f"{seed} is outside [{MIN_SEED}, {MAX_SEED}]", limit=MAX_SEED)
    return seed & MAX_SEED


def _prompts(prompt: str | list[Any] | None) -> list[str] | list[list[int]]:
    if prompt is None:
        raise InvalidRequest("prompt", "is missing")
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt", "is empty", limit=1)
    kind = type(prompt[0])
    if kind is not int and len(prompt) > MAX_PROMPTS:
        raise InvalidRequest("prompt", f"has {len(prompt)} prompts; at most {MAX_PROMPTS} are taken", limit=MAX_PROMPTS)
    if any(type(part) is not kind for part in prompt):
        raise InvalidRequest("prompt", "mixes texts, token ids and lists of token ids")
    return [prompt] if kind is int else prompt


def _messages(messages: list[dict[str, Any]] | None) -> list[Mapping[str, object]]:
    if not messages:
        raise InvalidRequest("messages", "need at least one message", limit=1)
    _check_length("messages", messages)
    return [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _message(field: str, message: dict[str, Any]) -> Mapping[str, object]:
    if not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{field}.role", "is not a string")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise InvalidRequest(f"{field}.content", "is neither a string nor a list of parts")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{field}.content", 'has a part that is not {"type": "text", "text": "…"}; only text is served')
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}
