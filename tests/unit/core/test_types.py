"""SamplingParams.validate: whatever is outside its limits is refused, by the name of the field and with the limits."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import InvalidRequest
from services.core.noise import MAX_SEED
from services.core.types import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams, check_token_id

VOCAB_SIZE = 100
NAN, INF = math.nan, math.inf
# field → (limits as the error prints them, accepted values, refused values)
RANGES: dict[str, tuple[str, list[float], list[float]]] = {
    "temperature": ("[0.0, 100.0]", [0.0, 1e-3, 1.0, 100.0], [-1e-9, 100.1]),
    "top_p": ("(0.0, 1.0]", [1e-9, 0.5, 1.0], [0.0, -0.1, 1.0000001]),
    "min_p": ("[0.0, 1.0]", [0.0, 0.5, 1.0], [-1e-9, 1.0000001]),
    "frequency_penalty": ("[-2.0, 2.0]", [-2.0, 0.0, 2.0], [-2.01, 2.01]),
    "presence_penalty": ("[-2.0, 2.0]", [-2.0, 0.0, 2.0], [-2.01, 2.01]),
    "repetition_penalty": ("(0.0, 100.0]", [1e-3, 1.0, 100.0], [0.0, -1.0, 100.1]),
    "top_k": ("[0, ∞)", [0, 1, 10**6], [-1]),
    "n": (f"[1, {MAX_CHOICES}]", [1, MAX_CHOICES], [0, -1, MAX_CHOICES + 1]),
    "min_tokens": ("[0, ∞)", [0, 10**6], [-1]),
    "seed": (f"[0, {MAX_SEED}]", [0, MAX_SEED], [-1, MAX_SEED + 1, 10**400]),
    "max_tokens": ("[1, ∞)", [1, 10**6], [0, -1]),
    "logprobs": (f"[0, {MAX_LOGPROBS}]", [0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1]),
    "prompt_logprobs": (f"[0, {MAX_LOGPROBS}]", [0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1]),
}
ACCEPTED = [(field, value) for field, (_, values, _) in RANGES.items() for value in values]
REFUSED = [(field, limits, value) for field, (limits, _, values) in RANGES.items() for value in [*values, NAN, INF, -INF]]


def short_id(value: object) -> str:
    """A test's name without hundreds of digits."""
    text = str(value)
    return text if len(text) < 25 else f"{text[0]}e{len(text) - 1}"


def make_params(**fields: Any) -> SamplingParams:
    return SamplingParams(**fields)


def test_ranges_here_cover_every_field_but_the_collections_and_the_flag() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names - set(RANGES) == {"logit_bias", "stop_token_ids", "ignore_eos"}


def test_validate_when_all_is_default_accepts() -> None:
    SamplingParams().validate(vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(("field", "value"), ACCEPTED, ids=short_id)
def test_validate_when_a_field_is_at_or_inside_its_limits_accepts(field: str, value: float) -> None:
    make_params(**{field: value}).validate(vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(("field", "limits", "value"), REFUSED, ids=short_id)
def test_validate_when_a_field_is_outside_its_limits_raises_with_its_name_and_limits(field: str, limits: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_params(**{field: value}).validate(vocab_size=VOCAB_SIZE)
    assert (caught.value.field, caught.value.limit) == (field, limits)
    assert caught.value.message == f"{field}: {value} is outside {limits}"


def test_validate_when_min_tokens_exceed_max_tokens_raises() -> None:
    SamplingParams(min_tokens=5, max_tokens=5).validate(vocab_size=VOCAB_SIZE)
    with pytest.raises(InvalidRequest, match="min_tokens: 6 is more than max_tokens 5") as caught:
        SamplingParams(min_tokens=6, max_tokens=5).validate(vocab_size=VOCAB_SIZE)
    assert (caught.value.field, caught.value.limit) == ("min_tokens", 5)


@pytest.mark.parametrize("bias", [-MAX_LOGIT_BIAS, 0.0, MAX_LOGIT_BIAS])
@pytest.mark.parametrize("token_id", [0, VOCAB_SIZE - 1])
def test_validate_when_logit_bias_is_inside_its_limits_accepts(token_id: int, bias: float) -> None:
    SamplingParams(logit_bias={token_id: bias}).validate(vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("bias", [NAN, INF, -INF, 100.1, -100.1])
def test_validate_when_a_bias_is_outside_its_limits_raises_with_its_token(bias: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(logit_bias={1: 0.0, 7: bias}).validate(vocab_size=VOCAB_SIZE)
    assert (caught.value.field, caught.value.limit) == ("logit_bias[7]", "[-100.0, 100.0]")


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 10**400], ids=short_id)
@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_validate_when_a_token_id_is_outside_the_vocabulary_raises(field: str, token_id: int) -> None:
    value = {3: 1.0, token_id: 1.0} if field == "logit_bias" else (3, token_id)
    with pytest.raises(InvalidRequest) as caught:
        make_params(**{field: value}).validate(vocab_size=VOCAB_SIZE)
    assert (caught.value.field, caught.value.limit) == (field, VOCAB_SIZE - 1)
    assert str(token_id) in caught.value.message


@given(st.integers())
def test_check_token_id_when_any_integer_comes_refuses_exactly_those_outside(token_id: int) -> None:
    if 0 <= token_id < VOCAB_SIZE:
        check_token_id("prompt", token_id, VOCAB_SIZE)
    else:
        with pytest.raises(InvalidRequest, match=r"prompt: token id -?\d+ is outside the vocabulary of 100"):
            check_token_id("prompt", token_id, VOCAB_SIZE)


@given(
    st.fixed_dictionaries(
        {name: st.floats() for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")}
    ),
    st.fixed_dictionaries({name: st.integers() for name in ("top_k", "n", "min_tokens", "seed", "max_tokens", "logprobs")}),
)
def test_validate_when_fields_are_anything_raises_nothing_but_invalid_request(floats: dict[str, float], ints: dict[str, int]) -> None:
    params = make_params(**floats, **ints)
    try:
        params.validate(vocab_size=VOCAB_SIZE)
    except InvalidRequest:
        return
    assert all(map(math.isfinite, floats.values()))


@pytest.mark.parametrize(
    ("fields", "greedy", "penalties", "filters"),
    [
        ({}, False, False, False),
        ({"temperature": 0.0}, True, False, False),
        ({"frequency_penalty": -0.5}, False, True, False),
        ({"presence_penalty": 0.5}, False, True, False),
        ({"repetition_penalty": 0.9}, False, True, False),
        ({"top_k": 1}, False, False, True),
        ({"top_p": 0.9}, False, False, True),
        ({"min_p": 0.1}, False, False, True),
    ],
)
def test_params_when_asked_what_they_do_say_so(fields: dict[str, float], greedy: bool, penalties: bool, filters: bool) -> None:
    params = make_params(**fields)
    assert (params.is_greedy, params.has_penalties, params.has_filters) == (greedy, penalties, filters)


@pytest.mark.parametrize(
    ("field", "most", "fields"),
    [
        ("logit_bias", 4096, {"logit_bias": dict.fromkeys(range(4097), 1.0)}),
        ("stop_token_ids", 1024, {"stop_token_ids": (5,) * 1025}),
    ],
)
def test_validate_when_a_collection_has_one_too_many_raises_with_the_number_that_is_taken(
    field: str, most: int, fields: dict[str, Any]
) -> None:
    one_less = dict(list(fields[field].items())[1:]) if field == "logit_bias" else fields[field][1:]
    make_params(**{field: one_less}).validate(vocab_size=5000)
    with pytest.raises(InvalidRequest) as caught:
        make_params(**fields).validate(vocab_size=5000)
    assert (caught.value.field, caught.value.limit) == (field, most)
