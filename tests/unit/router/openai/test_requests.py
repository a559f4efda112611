"""Whatever a body holds, it is a request or an InvalidRequest that names the field."""

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import InvalidRequest
from services.mesh.convert import sampling_from_proto
from services.router.openai.requests import MAX_ENTRIES, parse_chat, parse_completion, parse_detokenize, parse_tokenize

PARSERS = (parse_completion, parse_chat, parse_tokenize, parse_detokenize)
HELLO = [{"role": "user", "content": "hello"}]


def body(**fields: object) -> bytes:
    return msgspec.json.encode({"prompt": "x", "messages": HELLO} | fields)


def test_completion_when_it_has_every_field_passes_them_on() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "n": 2,
        "min_tokens": 1,
        "max_tokens": 9,
        "ignore_eos": True,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "stop_token_ids": [5, 6],
        "logprobs": 4,
    }
    wanted = parse_completion(
        body(**fields, logit_bias={"5": -1.5}, stop="a", cache_salt="é", user="u", model="m", best_of=2, request_id="r", unknown=[1])
    )
    sampling = sampling_from_proto(wanted.options.sampling)
    for name, value in fields.items():
        assert getattr(sampling, name) == (tuple(value) if isinstance(value, list) else value), name
    assert sampling.logit_bias == {5: -1.5}
    assert (wanted.options.stop, wanted.options.cache_salt, wanted.options.model) == (("a",), "é".encode(), "m")
    assert wanted.options.request_id == "r"


def test_fields_when_absent_or_null_leave_the_checkpoints_defaults() -> None:
    for given_fields in ({}, {"temperature": None, "seed": None, "top_k": None, "n": None, "logprobs": None, "max_tokens": None}):
        sampling = parse_completion(body(**given_fields)).options.sampling
        assert sampling.ByteSize() == 0
    assert parse_completion(body(top_k=-1)).options.sampling.HasField("top_k")


def test_seed_when_negative_is_the_same_64_bits() -> None:
    assert parse_completion(body(seed=-1)).options.sampling.seed == 2**64 - 1


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("x", ["x"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompt_when_of_any_kind_becomes_a_list(prompt: object, prompts: object) -> None:
    assert parse_completion(body(prompt=prompt)).prompts == prompts


def test_echo_when_no_tokens_are_wanted_asks_for_one_and_shows_none() -> None:
    wanted = parse_completion(body(echo=True, max_tokens=0, logprobs=1))
    assert (wanted.options.sampling.max_tokens, wanted.echo, wanted.show_completion) == (1, True, False)
    assert parse_completion(body(max_tokens=0)).options.sampling.max_tokens == 0  # refused later, by its name


def test_chat_when_content_is_in_parts_joins_their_texts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    wanted = parse_chat(body(messages=[{"role": "user", "content": parts, "name": "n"}], tools=[{"type": "function"}], tool_choice="auto"))
    assert wanted.messages == [{"role": "user", "content": "a\nb", "name": "n"}]
    assert wanted.tools == [{"type": "function"}]


def test_chat_when_it_has_both_limits_takes_the_newer_one() -> None:
    assert parse_chat(body(max_tokens=3, max_completion_tokens=4)).options.sampling.max_tokens == 4


def test_chat_when_logprobs_are_wanted_has_as_many_alternatives_as_top_logprobs() -> None:
    assert parse_chat(body(logprobs=True)).options.sampling.logprobs == 0
    assert parse_chat(body(logprobs=True, top_logprobs=5)).options.sampling.logprobs == 5
    assert not parse_chat(body(logprobs=False)).options.sampling.HasField("logprobs")


REFUSED_COMPLETIONS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [1, "a"]}),
    ("prompt[0]", {"prompt": [1.5]}),
    ("prompt[1][0]", {"prompt": [[1], ["a"]]}),
    ("prompt", {"prompt": ["x"] * 129}),
    ("n", {"prompt": ["x"] * 128, "n": 9}),
    ("n", {"n": 10**30}),
    ("n", {"n": -1}),
    ("n", {"n": "2"}),
    ("n", {"n": 2.5}),
    ("n", {"n": True}),
    ("temperature", {"temperature": "hot"}),
    ("seed", {"seed": 2**64}),
    ("seed", {"seed": -(2**63) - 1}),
    ("top_k", {"top_k": -2}),
    ("max_tokens", {"max_tokens": -1}),
    ("min_tokens", {"min_tokens": 2**32}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": -1}),
    ("stop", {"stop": 3}),
    ("stop[1]", {"stop": ["a", 3]}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("stop_token_ids", {"stop_token_ids": [1] * (MAX_ENTRIES + 1)}),
    ("logit_bias", {"logit_bias": {"-1": 1.0}}),
    ("logit_bias", {"logit_bias": {"a": 1.0}}),
    ("best_of", {"best_of": 2}),
    ("suffix", {"suffix": "s"}),
    ("use_beam_search", {"use_beam_search": True}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("skip_special_tokens", {"skip_special_tokens": False}),
    ("structured_outputs", {"structured_outputs": {"regex": "a"}}),
]
REFUSED_CHATS: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages[0]", {"messages": ["x"]}),
    ("messages[0].role", {"messages": [{"content": "x"}]}),
    ("messages[1].content", {"messages": [*HELLO, {"role": "user", "content": 3}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("max_completion_tokens", {"max_completion_tokens": -1}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("logprobs", {"logprobs": 1}),
    ("tool_choice", {"tool_choice": "required"}),
    ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("audio", {"audio": {"voice": "v"}}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("response_format", {"response_format": {"type": "json_schema", "json_schema": {}}}),
    ("echo", {"echo": True}),
    ("chat_template", {"chat_template": "{{ messages }}"}),
]


@pytest.mark.parametrize(("field", "fields"), REFUSED_COMPLETIONS)
def test_completion_when_a_field_is_wrong_is_refused_by_its_name(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_completion(body(**fields))
    assert refusal.value.field.removesuffix("[...]") == field


@pytest.mark.parametrize(("field", "fields"), REFUSED_CHATS)
def test_chat_when_a_field_is_wrong_is_refused_by_its_name(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_chat(body(**fields))
    assert refusal.value.field == field


def test_fields_that_are_not_served_when_they_ask_for_nothing_are_let_through() -> None:
    parse_completion(body(suffix="", use_beam_search=False, response_format={"type": "text"}, best_of=1, skip_special_tokens=True))
    parse_chat(body(tools=[], tool_choice="none", modalities=["text"], audio=None, functions=[], response_format=None))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"prompt":NaN}',
        b'{"temperature":Infinity}',
        b'{"temperature":1e999}',
        b'{"seed":1' + b"0" * 5000 + b"}",
        b'{"prompt":"\xff"}',
        b'{"prompt":"\\ud800"}',
        b'{"messages":[{"role":"\\udc00"}]}',
        b'{"unknown":' + b"[" * 100_000,
        b'{"unknown":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages":[{"role":"user","content":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
        b'{"prompt":"x"} trailing',
    ],
)
def test_body_when_it_is_broken_is_refused(data: bytes) -> None:
    for parse in PARSERS:
        with pytest.raises(InvalidRequest):
            parse(data)


def test_body_when_a_key_comes_twice_means_the_last() -> None:
    assert parse_completion(b'{"prompt":"x","n":1,"n":2}').options.sampling.n == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
NAMES = sorted(
    {
        *("prompt", "messages", "tokens", "model", "n", "seed", "temperature", "top_k", "stop", "stop_token_ids", "logit_bias", "logprobs"),
        *("top_logprobs", "max_tokens", "max_completion_tokens", "min_tokens", "stream", "stream_options", "echo", "best_of", "suffix"),
        *("tools", "tool_choice", "chat_template_kwargs", "documents", "cache_salt", "request_id", "response_format", "reasoning_effort"),
    }
)
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=5) | st.lists(st.integers(-1, 2**33), max_size=3) | st.lists(st.text(max_size=3), max_size=3),
        "messages": st.lists(st.fixed_dictionaries({"role": st.text(max_size=4), "content": JSON}), max_size=3),
        "tokens": st.lists(st.integers(), max_size=3),
        "n": st.integers(-2, 2000),
        "logit_bias": st.dictionaries(st.integers().map(str), st.floats(-200, 200), max_size=3),
        "stop_token_ids": st.lists(st.integers(), max_size=3),
        "max_tokens": st.integers(),
        "temperature": st.floats(allow_nan=False, allow_infinity=False),
        "stream": st.booleans(),
    },
)


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JSON, max_size=6) | PLAUSIBLE | JSON)
def test_any_json_when_parsed_is_a_request_or_invalid(value: object) -> None:
    for parse in PARSERS:
        with contextlib.suppress(InvalidRequest):
            parse(msgspec.json.encode(value))


@given(st.binary(max_size=60))
def test_any_bytes_when_parsed_are_a_request_or_invalid(data: bytes) -> None:
    for parse in PARSERS:
        for whole in (data, b'{"prompt":' + data + b"}", b'{"prompt":"' + data + b'"}'):
            with contextlib.suppress(InvalidRequest):
                parse(whole)
