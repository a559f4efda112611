"""Between Baton's own values and their messages: the one place that knows both sides. Pure functions."""

import itertools
import sys
from array import array
from collections.abc import Iterable, Sequence

from protos.baton.v1 import common_pb2, decode_pb2, prefill_pb2
from services.core.errors import InvalidRequest
from services.core.prefix_hash import HASH_BYTES, TOKEN_BYTES, pack_tokens
from services.core.types import MAX_LOGPROBS, FinishReason, SamplingParams, TokenLogprobs, check_counts
from services.mesh.kv_transport import KVEndpoint, KVRegion

# Fields whose absence means the checkpoint's default, else that of SamplingParams.
_OPTIONAL = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "n",
    "max_tokens",
    "logprobs",
    "prompt_logprobs",
)

MAX_U32 = 2**32 - 1
MAX_REGIONS = 64

_FINISH = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
}
_REASON = {message: reason for reason, message in _FINISH.items()}


def sampling_from_proto(message: common_pb2.SamplingParams, defaults: common_pb2.SamplingParams | None = None) -> SamplingParams:
    """The message's field, else the default's, else that of SamplingParams. The result is not validated yet.

    Raises InvalidRequest for more logit biases or stop tokens than anybody takes: reading a million of them would hold up everybody else.
    """
    check_counts(num_logit_biases=len(message.logit_bias), num_stop_token_ids=len(message.stop_token_ids))
    values = {}
    for name in _OPTIONAL:
        for source in (message, defaults):
            if source is not None and source.HasField(name):
                values[name] = getattr(source, name)
                break
    return SamplingParams(
        **values,
        logit_bias=dict(message.logit_bias),
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
    )


def sampling_to_proto(params: SamplingParams) -> common_pb2.SamplingParams:
    """Every field that is not None; sampling_from_proto gives equal values back.

    `params` are valid. Raises InvalidRequest for a number that is, but has no room in the message.
    """
    for name in ("top_k", "min_tokens", "max_tokens"):
        if (getattr(params, name) or 0) > MAX_U32:
            raise InvalidRequest(name, f"{getattr(params, name)} is more than {MAX_U32}", limit=MAX_U32)
    message = common_pb2.SamplingParams(
        logit_bias=params.logit_bias,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
    )
    for name in _OPTIONAL:
        value = getattr(params, name)
        if value is not None:
            setattr(message, name, value)
    return message


def split_prompt(token_ids: list[int], prompt_length: int) -> tuple[list[int], list[int]]:
    """The prompt of a Start or PrefillRequest, and the tokens that the choice has already. Raises InvalidRequest for a length beyond."""
    if prompt_length > len(token_ids):
        raise InvalidRequest("prompt_length", f"{prompt_length} is more than the {len(token_ids)} tokens", limit=len(token_ids))
    split = prompt_length or len(token_ids)
    return token_ids[:split], token_ids[split:]


def token_ids_to_proto(token_ids: Iterable[int]) -> common_pb2.TokenIds:
    """Raises OverflowError for an id outside 0 … 2**32 - 1."""
    return common_pb2.TokenIds(packed=pack_tokens(token_ids))


def token_ids_from_proto(message: common_pb2.TokenIds, field: str) -> list[int]:
    """Raises InvalidRequest naming `field` when the bytes are not whole ids."""
    if len(message.packed) % TOKEN_BYTES:
        raise InvalidRequest(field, f"has {len(message.packed)} bytes, which is not a multiple of {TOKEN_BYTES}", limit=TOKEN_BYTES)
    return unpack_u32(message.packed)


def pack_u32(values: Iterable[int]) -> bytes:
    """A column of little-endian uint32, as in StepFrame."""
    return pack_tokens(values)


def unpack_u32(packed: bytes) -> list[int]:
    """What pack_u32 was given; `packed` has a multiple of four bytes."""
    values = array("I", packed)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def hashes_from_bytes(packed: bytes, field: str) -> list[bytes]:
    """Concatenated block hashes one by one. Raises InvalidRequest naming `field` when the last one is cut off."""
    if len(packed) % HASH_BYTES:
        raise InvalidRequest(field, f"has {len(packed)} bytes, which is not a multiple of {HASH_BYTES}", limit=HASH_BYTES)
    return [packed[start : start + HASH_BYTES] for start in range(0, len(packed), HASH_BYTES)]


def finish_reason_to_proto(reason: FinishReason | None) -> common_pb2.FinishReason:
    return _FINISH[reason]


def finish_reason_from_proto(message: common_pb2.FinishReason) -> FinishReason | None:
    """None while a choice goes on; a value of a later version counts as an abort."""
    return _REASON.get(message, FinishReason.ABORT)


def logprobs_to_proto(logprobs: TokenLogprobs) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        chosen=logprobs.chosen,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def logprobs_from_proto(message: common_pb2.TokenLogprobs) -> TokenLogprobs:
    """Raises InvalidRequest when there are more token ids than logprobs, or fewer, or more than anybody can ask for."""
    if len(message.top_token_ids) > MAX_LOGPROBS:
        raise InvalidRequest("logprobs", f"are of {len(message.top_token_ids)} tokens, more than {MAX_LOGPROBS}", limit=MAX_LOGPROBS)
    if len(message.top_token_ids) != len(message.top_logprobs):
        raise InvalidRequest("logprobs", f"{len(message.top_token_ids)} token ids have {len(message.top_logprobs)} values")
    return TokenLogprobs(chosen=message.chosen, top=tuple(zip(message.top_token_ids, message.top_logprobs, strict=True)))


def prompt_logprobs_to_proto(handle: int, logprobs: Sequence[TokenLogprobs]) -> decode_pb2.PromptLogprobs:
    """All entries have as many `top` ones."""
    top = list(itertools.chain.from_iterable(entry.top for entry in logprobs))
    return decode_pb2.PromptLogprobs(
        handle=handle,
        chosen=_pack_f32([entry.chosen for entry in logprobs]),
        num_top=len(logprobs[0].top) if logprobs else 0,
        top_token_ids=pack_u32([token_id for token_id, _ in top]),
        top_logprobs=_pack_f32([logprob for _, logprob in top]),
    )


def prompt_logprobs_from_proto(message: decode_pb2.PromptLogprobs) -> list[TokenLogprobs]:
    """Raises InvalidRequest when the columns are not whole, or differ in length."""
    num_top, num_entries = message.num_top, len(message.chosen) // 4
    if len(message.chosen) % 4 or not len(message.top_token_ids) == len(message.top_logprobs) == 4 * num_top * num_entries:
        raise InvalidRequest("prompt_logprobs", "has columns that are not whole or differ in length")
    top = list(zip(unpack_u32(message.top_token_ids), _unpack_f32(message.top_logprobs), strict=True))
    return [
        TokenLogprobs(chosen=chosen, top=tuple(top[index * num_top : (index + 1) * num_top]))
        for index, chosen in enumerate(_unpack_f32(message.chosen))
    ]


def _pack_f32(values: Iterable[float]) -> bytes:
    column = array("f", values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def _unpack_f32(packed: bytes) -> list[float]:
    column = array("f", packed)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tolist()


def first_difference(left: common_pb2.ModelIdentity, right: common_pb2.ModelIdentity) -> str | None:
    """Why KV blocks must not travel between two workers; None: they may."""
    names: Sequence[str] = ("model_fingerprint", "layout_fingerprint", "block_size", "block_bytes")
    for name in names:
        if getattr(left, name) != getattr(right, name):
            return name
    return None


def endpoint_to_proto(endpoint: KVEndpoint) -> prefill_pb2.KVEndpoint:
    return prefill_pb2.KVEndpoint(
        host_id=endpoint.host_id,
        shm_address=endpoint.shm_address,
        tcp_address=endpoint.tcp_address,
        grpc=endpoint.grpc,
        access_key=endpoint.access_key,
        regions=[prefill_pb2.KVRegion(num_blocks=region.num_blocks, block_bytes=region.block_bytes) for region in endpoint.regions],
    )


def endpoint_from_proto(message: prefill_pb2.KVEndpoint) -> KVEndpoint:
    """Raises InvalidRequest for more regions than any model has KV groups."""
    if len(message.regions) > MAX_REGIONS:
        raise InvalidRequest("endpoint.regions", f"are {len(message.regions)}, more than {MAX_REGIONS}", limit=MAX_REGIONS)
    return KVEndpoint(
        host_id=message.host_id,
        shm_address=message.shm_address,
        tcp_address=message.tcp_address,
        grpc=message.grpc,
        access_key=message.access_key,
        regions=tuple(KVRegion(region.num_blocks, region.block_bytes) for region in message.regions),
    )
