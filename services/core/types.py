"""The words of a request: how it is sampled, why it ended, what it returned. Values only; knows nothing of engines or the wire."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.core.errors import InvalidRequest
from services.core.noise import MAX_SEED

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0
# Each of them costs whoever reads the request time, and every step of its sequence, too.
MAX_LOGIT_BIASES = 4096
MAX_STOP_TOKEN_IDS = 1024
# Divided by less than this, fp32 logits overflow before they differ from greedy.
GREEDY_BELOW = 1e-5


class FinishReason(enum.Enum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen; the defaults are OpenAI's.

    temperature         0 is greedy; noise is scaled in by dividing the logits
    top_k               keep the k best tokens; 0 keeps all
    top_p, min_p        nucleus mass in (0, 1]; least probability relative to the best token in [0, 1]
    frequency_penalty, presence_penalty   in [-2, 2], over generated tokens
    repetition_penalty  > 0, over prompt and generated tokens; 1 is none
    logit_bias          token id → addend in [-100, 100]
    seed                64-bit; None lets the one who admits the request draw it
    n                   choices per prompt
    max_tokens          None: as many as the model's context leaves
    stop_token_ids      end a sequence like the checkpoint's own end tokens, which `ignore_eos` switches off
    logprobs            None: none; k: the chosen token's and those of the k best
    prompt_logprobs     the same for each prompt token but the first; then the whole prompt is computed, whatever is cached
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    min_tokens: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_filters(self) -> bool:
        return self.top_k != 0 or self.top_p != 1.0 or self.min_p != 0.0

    @property
    def has_penalties(self) -> bool:
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0 or self.repetition_penalty != 1.0

    def validate(self, *, vocab_size: int) -> None:
        """Raises InvalidRequest naming the first field that is out of its limits."""
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_range("top_k", self.top_k, 0, None)
        _check_range("n", self.n, 1, MAX_CHOICES)
        _check_range("min_tokens", self.min_tokens, 0, None)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, MAX_SEED)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, None)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequest("min_tokens", f"{self.min_tokens} is more than max_tokens {self.max_tokens}", limit=self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), 0, MAX_LOGPROBS)
        check_counts(num_logit_biases=len(self.logit_bias), num_stop_token_ids=len(self.stop_token_ids))
        for token_id, bias in self.logit_bias.items():
            check_token_id("logit_bias", token_id, vocab_size)
            _check_range(f"logit_bias[{token_id}]", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        for token_id in self.stop_token_ids:
            check_token_id("stop_token_ids", token_id, vocab_size)


def check_counts(*, num_logit_biases: int, num_stop_token_ids: int) -> None:
    """Raises InvalidRequest when there are too many: apart from validate() for those who would have to read them all before it."""
    for name, count, limit in (
        ("logit_bias", num_logit_biases, MAX_LOGIT_BIASES),
        ("stop_token_ids", num_stop_token_ids, MAX_STOP_TOKEN_IDS),
    ):
        if count > limit:
            raise InvalidRequest(name, f"has {count} entries; at most {limit} are taken", limit=limit)


def check_token_id(field_name: str, token_id: int, vocab_size: int) -> None:
    """Raises InvalidRequest unless 0 <= token_id < vocab_size."""
    if not 0 <= token_id < vocab_size:
        raise InvalidRequest(field_name, f"token id {token_id} is outside the vocabulary of {vocab_size}", limit=vocab_size - 1)


def _check_range(name: str, value: float, low: float, high: float | None, *, low_open: bool = False) -> None:
    # NaN fails every comparison; math.isfinite would raise for an integer beyond the floats.
    inside = value < math.inf and (value > low if low_open else value >= low) and (high is None or value <= high)
    if not inside:
        opening = "(" if low_open else "["
        limits = f"{opening}{low}, {high}]" if high is not None else f"{opening}{low}, ∞)"
        raise InvalidRequest(name, f"{value} is outside {limits}", limit=limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural-log probabilities of one sampled position under the raw logits: before bias, penalties, temperature and filters."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first, ties by id


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token as it was chosen; what a prefill worker hands over for the first token of each choice."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTiming:
    """Where the time until a prompt's first token went, on the engine that computed it.

    queue_s     from when it could be computed here to the start of its first chunk
    prefill_s   from there to its first token
    model_s     inside the model: of each step the share that its tokens had in the batch
    sampled_at  when it had the first token, on the engine's clock: time.perf_counter()
    """

    queue_s: float
    prefill_s: float
    model_s: float
    sampled_at: float

    @property
    def began_at(self) -> float:
        """When its first chunk did."""
        return self.sampled_at - self.prefill_s

    @property
    def queued_at(self) -> float:
        return self.began_at - self.queue_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """What one engine step added to one choice of one request.

    position        index of the token in its sequence, prompt included; None when the event carries no token (an abort)
    cached_tokens   prompt tokens found in the prefix cache when the request was first admitted
    prefill         with the first token of choice 0, if its prompt was computed by this engine
    prompt_logprobs with the same token, if they were asked for: entry i is of prompt token i + 1
    """

    request_id: str
    choice: int
    token_id: int | None
    position: int | None
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    cached_tokens: int
    prefill: PrefillTiming | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
