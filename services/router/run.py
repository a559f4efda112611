"""State of one request over all its attempts: what it asks for, what has come of it so far, and how it goes on from there.

A choice goes on elsewhere from the token ids that have been received, whatever its worker had made beyond; its text, held-back stop strings
and logprobs live here and do not notice. Knows nothing of workers, except for which have failed it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from protos.baton.v1 import common_pb2, decode_pb2, inference_pb2
from services.core.errors import BatonError, DeadlineExceeded, Draining, InvalidRequest, PeerUnavailable, ResourceExhausted, Unavailable
from services.core.noise import choice_seed, draw_seed
from services.core.prefix_hash import chain_hashes, prefix_key
from services.core.types import SamplingParams, check_token_id
from services.mesh import convert
from services.router.choice import ChoiceText, check_stops
from services.router.decode_session import Arrival
from services.router.request import Delta, GenerationRequest, Summary
from services.router.route import Route
from services.router.stages import Stages
from services.tokenizer.tokenizer import Tokenizer

# Attempts in a row that bring nothing. A request on which workers die should not be handed to all of them.
MAX_ATTEMPTS = 3
MAX_ATTEMPTS_IN_ALL = 12
MAX_SALT_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one Start of an attempt is about: `choices` of the request, from their prompt, or one of them from what it has."""

    choices: Sequence[int]
    sampling: SamplingParams
    packed_tokens: bytes


class Run:
    """One request. Raises InvalidRequest when it can never be served.

    route, prefilled   of the attempt that brought the first token
    """

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        identity: common_pb2.ModelIdentity,
        *,
        router_id: str,
        recovery_s: float,
    ) -> None:
        self.request = request
        self.identity = identity
        self.sampling = _complete(request, identity)
        self.prefix_key = prefix_key(model_fingerprint=identity.model_fingerprint, salt=request.cache_salt)
        self.prompt_tokens = len(request.prompt_token_ids)
        self.route: Route | None = None
        self.decode_worker_id = ""
        self.attempts = 0
        self.stages = Stages(received_at=request.received_at, tokenize_s=request.tokenize_s)
        self.prefilled = decode_pb2.Prefilled()
        self.completion_tokens = 0
        self.prompt_logprobs_told = False
        self.failures = Failures(recovery_s)
        self._router_id = router_id
        self._packed_prompt = convert.pack_u32(request.prompt_token_ids)
        self._hashes: tuple[tuple[int, int], list[bytes]] | None = None
        num_choices = self.sampling.n
        self._open_choices = set(range(num_choices))
        self._outputs: list[list[int]] = [[] for _ in range(num_choices)]
        self._num_steps = [0] * num_choices
        self._texts = [
            ChoiceText(tokenizer.detokenizer(), stop=request.stop, min_tokens=self.sampling.min_tokens) for _ in range(num_choices)
        ]

    @property
    def is_finished(self) -> bool:
        return not self._open_choices

    @property
    def num_open(self) -> int:
        """Choices that go on."""
        return len(self._open_choices)

    @property
    def num_tokens(self) -> int:
        """To be computed before the longest open choice can go on."""
        return self.prompt_tokens + len(self._outputs[self._longest()])

    def remaining_s(self) -> float | None:
        """Until the deadline; None: there is none. Raises DeadlineExceeded when it has passed."""
        if self.request.remaining_s is None:
            return None
        remaining_s = self.request.remaining_s - (time.perf_counter() - self.request.received_at)
        if remaining_s <= 0:
            raise DeadlineExceeded("the deadline has passed")
        return remaining_s

    def block_hashes(self) -> list[bytes]:
        """Of all full blocks of the prompt and of what the longest open choice has."""
        longest = self._longest()
        key = longest, len(self._outputs[longest])
        if self._hashes is None or self._hashes[0] != key:
            packed = self._packed_prompt + convert.pack_u32(self._outputs[longest])
            self._hashes = key, chain_hashes(self.prefix_key, packed, self.identity.block_size)
        return self._hashes[1]

    def next_positions(self) -> list[int]:
        """By choice, where its next token belongs."""
        return [self.prompt_tokens + len(output) for output in self._outputs]

    def parts(self) -> list[Part]:
        """What the next attempt has to start: everything at once, or each open choice from where it is, the longest one first."""
        if not any(self._outputs):
            return [Part(choices=range(self.sampling.n), sampling=self.sampling, packed_tokens=self._packed_prompt)]
        assert self.sampling.seed is not None
        longest = self._longest()
        return [
            Part(
                choices=(choice,),
                sampling=replace(self.sampling, n=1, seed=choice_seed(self.sampling.seed, choice), prompt_logprobs=None),
                packed_tokens=self._packed_prompt + convert.pack_u32(self._outputs[choice]),
            )
            for choice in sorted(self._open_choices, key=lambda choice: (choice != longest, choice))
        ]

    def take(self, arrival: Arrival) -> Delta | None:
        """Turns tokens into text; None for a choice that a stop string has ended already."""
        if arrival.choice not in self._open_choices:
            return None
        choice, token_ids, logprobs, finish_reason = arrival
        assert self.sampling.max_tokens is not None
        if len(self._outputs[choice]) + len(token_ids) > self.sampling.max_tokens:
            raise PeerUnavailable(f"{self.decode_worker_id} did not end a choice after {self.sampling.max_tokens} tokens")
        text, num_tokens, finish_reason = self._texts[choice].push(token_ids, finish_reason)
        self.completion_tokens += num_tokens
        self._outputs[choice] += token_ids
        self._num_steps[choice] += bool(token_ids)
        if finish_reason is not None:
            self._open_choices.discard(choice)
            if not self._open_choices:
                self.stages.finished()
        return Delta(choice, text, token_ids[:num_tokens], logprobs[:num_tokens], finish_reason)

    def summary(self) -> Summary:
        request, facts, route = self.request, self.prefilled, self.route
        assert route is not None
        predicted = route.decode_cached_tokens if route.is_local else route.prefill_cached_tokens[0]
        timing = inference_pb2.RequestTiming(
            request_id=request.request_id,
            router_id=self._router_id,
            decode_worker_id=self.decode_worker_id,
            prefill_worker_id=facts.prefill_worker_id,
            route_reason=route.explain(),
            seed=self.sampling.seed,
            model_s=facts.model_s,
            transfer_s=facts.transfer_s,
            decode_cached_tokens=facts.decode_cached_tokens,
            prefill_cached_tokens=facts.prefill_cached_tokens,
            predicted_cached_tokens=predicted,
            predicted_ttft_s=route.predicted_ttft_s,
            kv_transport=facts.kv_transport,
            kv_blocks=facts.kv_blocks,
            kv_bytes=facts.kv_bytes,
            attempts=self.attempts,
            prefill_attempts=facts.prefill_attempts,
            steps=max(self._num_steps),
        )
        cached_tokens = facts.prefill_cached_tokens if facts.prefill_worker_id else facts.decode_cached_tokens
        self.stages.fill(timing, facts)
        return Summary(
            prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens, cached_tokens=cached_tokens, timing=timing
        )

    def _longest(self) -> int:
        """The open choice that has the most tokens."""
        return max(sorted(self._open_choices), key=lambda choice: len(self._outputs[choice]))


class Failures:
    """Who has failed a request since it last made progress, and how long it may still look for somebody else.

    recovery_s   how long it waits for a worker to come (back) when none is left
    excluded     worker ids that are not to be tried again yet
    """

    def __init__(self, recovery_s: float) -> None:
        self._recovery_s = recovery_s
        self.excluded: list[str] = []
        self._last: BatonError | None = None
        self._alone_since: float | None = None  # nobody is left
        self._num_fruitless = self._num_in_all = self._num_tokens = 0

    def note(self, worker_id: str, error: BatonError, *, num_tokens: int) -> None:
        """An attempt has failed; `num_tokens` have come so far, over all attempts. Raises the error when no other one may follow."""
        if num_tokens > self._num_tokens:
            self.excluded.clear()
            self._num_fruitless, self._num_tokens, self._alone_since = 0, num_tokens, None
        self._last = error
        self.excluded.append(worker_id)
        if isinstance(error, ResourceExhausted | Draining):
            return  # it was refused, and has harmed nobody
        self._alone_since = None
        self._num_fruitless += 1
        self._num_in_all += 1
        if self._num_fruitless >= MAX_ATTEMPTS or self._num_in_all >= MAX_ATTEMPTS_IN_ALL:
            raise error

    def nobody_left(self, error: BatonError) -> None:
        """There is no worker to try: they may be tried again. Raises when it makes no sense to wait for that, or not any longer."""
        if self._last is None:
            raise error
        is_full = isinstance(self._last, ResourceExhausted) and not self._num_tokens
        now = time.monotonic()
        self._alone_since = self._alone_since or now
        if is_full or not isinstance(self._last, Unavailable | ResourceExhausted) or now - self._alone_since > self._recovery_s:
            raise self._last from None
        self.excluded.clear()


def _complete(request: GenerationRequest, identity: common_pb2.ModelIdentity) -> SamplingParams:
    """The request's sampling with a seed and a length. Raises InvalidRequest for what no worker could serve."""
    prompt_tokens = len(request.prompt_token_ids)
    room = identity.max_model_len - prompt_tokens
    if prompt_tokens == 0:
        raise InvalidRequest("prompt", "is empty", limit=1)
    if room < 1:
        raise InvalidRequest(
            "prompt",
            f"has {prompt_tokens} tokens; the model takes {identity.max_model_len} with at least one new token",
            limit=identity.max_model_len - 1,
        )
    for token_id in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
        check_token_id("prompt", token_id, identity.vocab_size)
    check_stops(request.stop)
    if len(request.cache_salt) > MAX_SALT_BYTES:
        raise InvalidRequest("cache_salt", f"has {len(request.cache_salt)} bytes; at most {MAX_SALT_BYTES} are taken", limit=MAX_SALT_BYTES)
    sampling = request.sampling
    sampling.validate(vocab_size=identity.vocab_size)
    if sampling.max_tokens is not None and sampling.max_tokens > room:
        raise InvalidRequest(
            "max_tokens",
            f"{sampling.max_tokens} new tokens after a prompt of {prompt_tokens} exceed the model's {identity.max_model_len}",
            limit=room,
        )
    return replace(
        sampling,
        seed=draw_seed() if sampling.seed is None else sampling.seed,
        max_tokens=room if sampling.max_tokens is None else sampling.max_tokens,
    )
