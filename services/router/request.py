"""What a client asks of the router, and the pieces that it gets. Values only; every face of the router speaks in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from protos.baton.v1 import inference_pb2
from services.core.types import FinishReason, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a client wants, in tokens.

    remaining_s   from received_at to its deadline; None: it has none
    received_at   time.perf_counter() of its arrival
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    stop: Sequence[str] = ()
    cache_salt: bytes = b""
    remaining_s: float | None = None
    trace_context: Mapping[str, str] = field(default_factory=dict)
    received_at: float
    tokenize_s: float


class PromptLogprobs(NamedTuple):
    """Of a request that asked for prompt_logprobs, once, before its first Delta: entry i is of prompt token i + 1."""

    logprobs: Sequence[TokenLogprobs]


class Delta(NamedTuple):  # one for each token
    """What one frame added to one choice; logprobs has an entry for each token, or none."""

    choice: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The last piece of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timing: inference_pb2.RequestTiming


Piece = PromptLogprobs | Delta | Summary
