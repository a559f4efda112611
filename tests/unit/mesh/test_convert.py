"""Values to messages, over the wire's bytes, and back."""

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

from protos.baton.v1 import common_pb2, decode_pb2, prefill_pb2
from services.core.errors import InvalidRequest
from services.core.types import FinishReason, SamplingParams, TokenLogprobs
from services.mesh import convert
from services.mesh.kv_transport import KVEndpoint, KVRegion

U32 = st.integers(0, 2**32 - 1)
FLOAT = st.floats(allow_nan=False)
FLOAT32 = st.floats(allow_nan=False, width=32)
SAMPLING = st.builds(
    SamplingParams,
    temperature=FLOAT,
    top_k=U32,
    top_p=FLOAT,
    min_p=FLOAT,
    frequency_penalty=FLOAT,
    presence_penalty=FLOAT,
    repetition_penalty=FLOAT,
    logit_bias=st.dictionaries(U32, FLOAT, max_size=5),
    seed=st.none() | st.integers(0, 2**64 - 1),
    n=U32,
    min_tokens=U32,
    max_tokens=st.none() | U32,
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(U32, max_size=5).map(tuple),
    logprobs=st.none() | U32,
)


def sent(message: common_pb2.SamplingParams) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams.FromString(message.SerializeToString())


# --- sampling ---


@given(SAMPLING)
@example(SamplingParams())
def test_sampling_when_sent_gives_equal_values_back(params: SamplingParams) -> None:
    assert convert.sampling_from_proto(sent(convert.sampling_to_proto(params))) == params


@given(SAMPLING, SAMPLING)
def test_sampling_when_a_complete_message_has_defaults_beside_it_ignores_them(params: SamplingParams, defaults: SamplingParams) -> None:
    found = convert.sampling_from_proto(convert.sampling_to_proto(params), convert.sampling_to_proto(defaults))
    for name in ("seed", "max_tokens", "logprobs"):  # None is absence, which defaults fill
        if getattr(params, name) is None:
            assert getattr(found, name) == getattr(defaults, name)
        else:
            assert getattr(found, name) == getattr(params, name)
    for name in ("temperature", "top_k", "top_p", "min_p", "n", "min_tokens", "ignore_eos", "logit_bias", "stop_token_ids"):
        assert getattr(found, name) == getattr(params, name)


# Values that are neither the message's zero nor SamplingParams' own default.
OTHER: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.1,
    "seed": 2**63 + 1,
    "n": 3,
    "max_tokens": 100,
    "logprobs": 2,
}


@pytest.mark.parametrize("name", OTHER)
def test_sampling_when_a_field_is_absent_takes_the_checkpoints_default_and_else_its_own(name: str) -> None:
    defaults = common_pb2.SamplingParams(**{name: OTHER[name]})
    assert getattr(convert.sampling_from_proto(common_pb2.SamplingParams(), defaults), name) == OTHER[name]
    assert convert.sampling_from_proto(common_pb2.SamplingParams(), common_pb2.SamplingParams()) == SamplingParams()
    assert convert.sampling_from_proto(common_pb2.SamplingParams()) == SamplingParams()


@pytest.mark.parametrize("name", OTHER)
def test_sampling_when_a_field_is_given_as_zero_is_not_taken_for_absent(name: str) -> None:
    defaults = common_pb2.SamplingParams(**{name: OTHER[name]})
    zero = common_pb2.SamplingParams()
    setattr(zero, name, 0)
    zero = sent(zero)
    value = getattr(convert.sampling_from_proto(zero, defaults), name)
    assert value == 0 and value is not None


@pytest.mark.parametrize("name", ["top_k", "min_tokens", "max_tokens"])
def test_sampling_when_a_valid_number_does_not_fit_the_message_raises_invalid_request_for_the_field(name: str) -> None:
    largest: dict[str, Any] = {"max_tokens": 2**32 - 1} | {name: 2**32 - 1}
    convert.sampling_to_proto(SamplingParams(**largest))
    too_large: dict[str, Any] = {"max_tokens": 2**40} | {name: 2**32}
    beyond = SamplingParams(**too_large)
    beyond.validate(vocab_size=10)
    with pytest.raises(InvalidRequest) as error:
        convert.sampling_to_proto(beyond)
    assert (error.value.field, error.value.limit) == (name, 2**32 - 1)


# --- packed numbers ---


@given(st.lists(U32))
def test_token_ids_when_packed_are_little_endian_and_come_back(token_ids: list[int]) -> None:
    message = convert.token_ids_to_proto(token_ids)
    assert message.packed == np.array(token_ids, dtype="<u4").tobytes()
    assert convert.token_ids_from_proto(message, "token_ids") == token_ids
    assert convert.unpack_u32(convert.pack_u32(token_ids)) == token_ids


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_token_ids_when_one_is_no_uint32_raise_overflow_error(token_id: int) -> None:
    with pytest.raises(OverflowError):
        convert.token_ids_to_proto([1, token_id])


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 5, 4 * 7 + 3])
def test_token_ids_when_the_last_one_is_cut_off_raise_invalid_request_for_the_field(num_bytes: int) -> None:
    with pytest.raises(InvalidRequest, match=f"^prompt.token_ids: has {num_bytes} bytes") as error:
        convert.token_ids_from_proto(common_pb2.TokenIds(packed=bytes(num_bytes)), "prompt.token_ids")
    assert (error.value.field, error.value.limit) == ("prompt.token_ids", 4)


@given(st.lists(st.binary(min_size=16, max_size=16)))
def test_hashes_when_concatenated_come_back_one_by_one(hashes: list[bytes]) -> None:
    assert convert.hashes_from_bytes(b"".join(hashes), "hashes") == hashes


@pytest.mark.parametrize("num_bytes", [1, 15, 17, 33])
def test_hashes_when_the_last_one_is_cut_off_raise_invalid_request_for_the_field(num_bytes: int) -> None:
    with pytest.raises(InvalidRequest, match=f"has {num_bytes} bytes") as error:
        convert.hashes_from_bytes(bytes(num_bytes), "event.stored")
    assert (error.value.field, error.value.limit) == ("event.stored", 16)


# --- what comes back from an engine ---


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_finish_reason_when_sent_comes_back(reason: FinishReason | None) -> None:
    message = convert.finish_reason_to_proto(reason)
    assert convert.finish_reason_from_proto(message) is reason
    assert common_pb2.FinishReason.Name(message) == f"FINISH_REASON_{'UNSPECIFIED' if reason is None else reason.name}"


def test_finish_reason_when_the_peer_knows_more_of_them_counts_as_an_abort() -> None:
    message: Any = 99
    assert convert.finish_reason_from_proto(message) is FinishReason.ABORT


def test_finish_reasons_when_the_enum_has_them_have_a_value_of_their_own_each() -> None:
    assert len({convert.finish_reason_to_proto(reason) for reason in (None, *FinishReason)}) == len(common_pb2.FinishReason.values())


@given(st.builds(TokenLogprobs, chosen=FLOAT32, top=st.lists(st.tuples(U32, FLOAT32), max_size=20).map(tuple)))
@example(TokenLogprobs(chosen=-math.inf, top=((0, -0.0),)))
def test_logprobs_when_sent_come_back_in_order(logprobs: TokenLogprobs) -> None:
    packed = convert.logprobs_to_proto(logprobs).SerializeToString()
    assert convert.logprobs_from_proto(common_pb2.TokenLogprobs.FromString(packed)) == logprobs


@pytest.mark.parametrize(("num_ids", "num_values"), [(1, 0), (2, 3)])
def test_logprobs_when_ids_and_values_are_not_as_many_raise_invalid_request(num_ids: int, num_values: int) -> None:
    message = common_pb2.TokenLogprobs(chosen=-1, top_token_ids=range(num_ids), top_logprobs=[-1.0] * num_values)
    with pytest.raises(InvalidRequest, match=f"^logprobs: {num_ids} token ids have {num_values} values"):
        convert.logprobs_from_proto(message)


# --- who may exchange KV blocks ---

IDENTITY = common_pb2.ModelIdentity(
    model_name="demo", model_fingerprint=b"m", layout_fingerprint=b"l", block_size=16, block_bytes=4096, max_model_len=512, vocab_size=10
)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({}, None),
        ({"model_name": "another name of it", "max_model_len": 256}, None),
        ({"model_fingerprint": b"M"}, "model_fingerprint"),
        ({"layout_fingerprint": b""}, "layout_fingerprint"),
        ({"block_size": 64}, "block_size"),
        ({"block_bytes": 1}, "block_bytes"),
        ({"block_bytes": 1, "model_fingerprint": b"M"}, "model_fingerprint"),
    ],
)
def test_first_difference_when_two_workers_are_compared_names_what_forbids_a_transfer(
    changed: dict[str, Any], difference: str | None
) -> None:
    other = common_pb2.ModelIdentity()
    other.CopyFrom(IDENTITY)
    for name, value in changed.items():
        setattr(other, name, value)
    assert convert.first_difference(IDENTITY, other) == convert.first_difference(other, IDENTITY) == difference


@given(
    st.builds(
        KVEndpoint,
        host_id=st.text(),
        shm_address=st.text(),
        tcp_address=st.text(),
        grpc=st.booleans(),
        access_key=st.binary(),
        regions=st.lists(st.builds(KVRegion, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))).map(tuple),
    )
)
def test_endpoint_when_sent_gives_equal_values_back(endpoint: KVEndpoint) -> None:
    packed = convert.endpoint_to_proto(endpoint).SerializeToString()
    assert convert.endpoint_from_proto(prefill_pb2.KVEndpoint.FromString(packed)) == endpoint


ANY_FLOAT = st.floats() | st.just(-0.0)
ANY_SAMPLING = st.builds(
    common_pb2.SamplingParams,
    temperature=st.none() | ANY_FLOAT,
    top_k=st.none() | U32,
    top_p=st.none() | ANY_FLOAT,
    repetition_penalty=st.none() | ANY_FLOAT,
    logit_bias=st.dictionaries(U32, ANY_FLOAT, max_size=3),
    seed=st.none() | st.integers(0, 2**64 - 1),
    n=st.none() | U32,
    min_tokens=U32,
    max_tokens=st.none() | U32,
    stop_token_ids=st.lists(U32, max_size=3) | st.just([1] * 1025),
    logprobs=st.none() | U32,
)


@given(ANY_SAMPLING, ANY_SAMPLING, st.integers(1, 2**32))
def test_sampling_when_a_message_is_anything_gives_a_value_that_is_refused_or_can_be_sent_on(
    message: common_pb2.SamplingParams, defaults: common_pb2.SamplingParams, vocab_size: int
) -> None:
    params: SamplingParams | None
    limit: object = None
    try:
        params = convert.sampling_from_proto(message, defaults)
        params.validate(vocab_size=vocab_size)
    except InvalidRequest as error:
        params, limit = None, error.limit
    if params is None:
        assert limit is not None
    else:
        assert convert.sampling_from_proto(convert.sampling_to_proto(params)) == params


@given(st.lists(U32, max_size=25), st.lists(FLOAT32 | st.floats(width=32), max_size=25))
def test_logprobs_when_a_message_is_anything_have_as_many_values_as_tokens_or_are_refused(ids: list[int], values: list[float]) -> None:
    message = common_pb2.TokenLogprobs(top_token_ids=ids, top_logprobs=values)
    if len(ids) == len(values) <= 20:
        assert [token_id for token_id, _ in convert.logprobs_from_proto(message).top] == ids
    else:
        with pytest.raises(InvalidRequest):
            convert.logprobs_from_proto(message)


@given(
    st.integers(0, 5).flatmap(
        lambda num_top: st.lists(st.tuples(FLOAT32, st.lists(st.tuples(U32, FLOAT32), min_size=num_top, max_size=num_top)))
    )
)
def test_prompt_logprobs_when_sent_come_back_in_order(entries: list[tuple[float, list[tuple[int, float]]]]) -> None:
    logprobs = [TokenLogprobs(chosen=chosen, top=tuple(top)) for chosen, top in entries]
    packed = convert.prompt_logprobs_to_proto(3, logprobs).SerializeToString()
    assert convert.prompt_logprobs_from_proto(decode_pb2.PromptLogprobs.FromString(packed)) == logprobs


@pytest.mark.parametrize(
    "columns",
    [
        {"chosen": bytes(5)},
        {"chosen": bytes(8), "num_top": 1, "top_token_ids": bytes(8), "top_logprobs": bytes(4)},
        {"chosen": bytes(8), "num_top": 2**32 - 1},
        {"chosen": bytes(8), "top_token_ids": bytes(8), "top_logprobs": bytes(8)},
    ],
)
def test_prompt_logprobs_when_the_columns_do_not_fit_are_refused(columns: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="prompt_logprobs"):
        convert.prompt_logprobs_from_proto(decode_pb2.PromptLogprobs(**columns))
