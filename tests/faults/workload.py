"""Requests whose right answers are known from an undisturbed run, and what a client gets for one. Knows nothing of faults."""

import argparse
import inspect
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import grpc

from protos.baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from services.core.types import SamplingParams
from services.mesh import convert, status

LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is sent; never with the same cache_salt twice, so that no prefix is cached and every prompt travels."""

    text: str
    sampling: SamplingParams
    stop: Sequence[str] = ()


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a client got, by choice; `code` None: all of it."""

    tokens: list[list[int]]
    texts: list[str]
    logprobs: list[list[common_pb2.TokenLogprobs]]
    finish_reasons: list[int]
    usage: inference_pb2.Usage | None = None
    timing: inference_pb2.RequestTiming = field(default_factory=inference_pb2.RequestTiming)
    code: grpc.StatusCode | None = None
    details: str = ""
    retry_after_s: float = 0.0  # what a client of Baton's makes of the error


async def ask(
    stub: inference_pb2_grpc.InferenceServiceStub, request: Request, *, request_id: str = "", timeout_s: float | None = None
) -> Answer:
    """Sends a request and reads to its end, whatever that is. Cancelling cancels it."""
    n = request.sampling.n
    answer = Answer(tokens=[[] for _ in range(n)], texts=[""] * n, logprobs=[[] for _ in range(n)], finish_reasons=[0] * n)
    message = inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text=request.text),
        sampling=convert.sampling_to_proto(request.sampling),
        stop=request.stop,
        cache_salt=uuid.uuid4().hex,
        include_timing=True,
    )
    call = stub.Generate(message, timeout=timeout_s, metadata=(("x-request-id", request_id or uuid.uuid4().hex),))
    try:
        async for response in call:
            choice = response.choice
            answer.tokens[choice] += convert.unpack_u32(response.token_ids.packed)
            answer.texts[choice] += response.text
            answer.logprobs[choice] += response.logprobs
            answer.finish_reasons[choice] = response.finish_reason or answer.finish_reasons[choice]
            if response.HasField("usage"):
                assert answer.usage is None, "a request ends once"
                answer.usage, answer.timing = response.usage, response.timing
    except grpc.aio.AioRpcError as error:
        answer.code, answer.details = error.code(), error.details() or ""
        answer.retry_after_s = getattr(status.from_rpc_error(error, "the router"), "retry_after_s", 0.0)
    finally:
        call.cancel()
    return answer


def difference(answer: Answer, expected: Answer) -> str | None:
    """In what an answer, whole or not, is unlike the one it should be; None: in nothing. cached_tokens may differ after a second try."""
    whole = answer.code is None
    for choice, tokens in enumerate(answer.tokens):
        right = expected.tokens[choice]
        if tokens != (right if whole else right[: len(tokens)]):
            return f"choice {choice}: tokens {tokens} instead of {right}"
        if not whole:
            if not expected.texts[choice].startswith(answer.texts[choice]):
                return f"choice {choice}: text {answer.texts[choice]!r} in {expected.texts[choice]!r}"
        elif answer.texts[choice] != expected.texts[choice]:
            return f"choice {choice}: text {answer.texts[choice]!r} instead of {expected.texts[choice]!r}"
        if len(answer.logprobs[choice]) != (len(tokens) if expected.logprobs[choice] else 0):
            return f"choice {choice}: {len(answer.logprobs[choice])} logprobs of {len(tokens)} tokens"
        for position, (got, due) in enumerate(zip(answer.logprobs[choice], expected.logprobs[choice], strict=False)):
            pairs = zip((got.chosen, *got.top_logprobs), (due.chosen, *due.top_logprobs), strict=True)
            if not all(math.isclose(one, other, rel_tol=0, abs_tol=LOGPROB_TOLERANCE) for one, other in pairs):
                return f"choice {choice}: logprobs of token {position}: {got} instead of {due}"
    if whole and answer.finish_reasons != expected.finish_reasons:
        return f"finish reasons {answer.finish_reasons} instead of {expected.finish_reasons}"
    if whole and (answer.usage is None or expected.usage is None):
        return "no usage"
    if whole and answer.usage and expected.usage:
        got_usage, due_usage = ((usage.prompt_tokens, usage.completion_tokens) for usage in (answer.usage, expected.usage))
        if got_usage != due_usage:
            return f"usage {got_usage} instead of {due_usage}"
    return None


def _code(start: int, characters: int) -> str:
    return inspect.getsource(argparse)[start : start + characters]


GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.7, top_p=0.95, seed=7, max_tokens=40, ignore_eos=True)
# The one that is followed to a step: 30 KV blocks in 8 chunks.
PROBE = Request(text=_code(20_000, 1_400), sampling=replace(SEEDED, seed=11, logprobs=2, max_tokens=32))
BACKGROUND = (
    Request(text=_code(3_000, 700), sampling=replace(GREEDY, logprobs=2)),
    Request(text=_code(9_000, 500), sampling=SEEDED),
    Request(text=_code(15_000, 600), sampling=replace(SEEDED, seed=3, n=2, max_tokens=24)),
    Request(text=_code(30_000, 600), sampling=replace(GREEDY, frequency_penalty=0.3)),
)


def with_stop_string(request: Request, answer: Answer) -> Request:
    """The same, ended by three characters from the middle of its undisturbed text."""
    text = answer.texts[0]
    return replace(request, stop=(text[len(text) // 2 : len(text) // 2 + 3],))
