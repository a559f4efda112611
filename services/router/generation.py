"""One request from its tokens to its text: admitted, routed, started on a decode worker, followed until every choice has ended.

The one path under every face of the router (gRPC, HTTP). What happens to a request is decided here; how it is written down for a client is
not known here, and neither is how a worker is reached.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from protos.baton.v1 import common_pb2, decode_pb2, inference_pb2
from services.core.errors import (
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    PeerUnavailable,
    ResourceExhausted,
    Unavailable,
)
from services.core.noise import draw_seed
from services.core.prefix_hash import chain_hashes, prefix_key
from services.core.types import FinishReason, SamplingParams, TokenLogprobs, check_token_id
from services.mesh import convert, failpoints
from services.mesh.index_client import IndexReplica
from services.router.admission import Admission
from services.router.choice import ChoiceText, check_stops
from services.router.decode_session import Arrival, RequestStream
from services.router.fleet import Fleet, InFlight, PrefillOutcome
from services.router.members import Members
from services.router.policy import choose
from services.router.route import Route, RouteRequest
from services.router.statistics import RouterStatistics
from services.tokenizer.tokenizer import Tokenizer

MAX_ATTEMPTS = 3
MAX_SALT_BYTES = 1024


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


class Delta(NamedTuple):  # one for each token
    """What one frame added to one choice; logprobs has an entry for each token, or none."""

    choice: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    finish_reason: FinishReason | None


class PromptLogprobs(NamedTuple):
    """Of a request that asked for prompt_logprobs, once, before its first Delta: entry i is of prompt token i + 1."""

    logprobs: Sequence[TokenLogprobs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The last piece of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timing: inference_pb2.RequestTiming


class Generator:
    """Runs requests for all faces of one router."""

    def __init__(
        self,
        members: Members,
        replica: IndexReplica,
        tokenizer: Tokenizer,
        admission: Admission,
        *,
        router_id: str,
        max_local_tokens: int | None,
    ) -> None:
        self._members = members
        self._replica = replica
        self._tokenizer = tokenizer
        self._admission = admission
        self._router_id = router_id
        self._max_local_tokens = max_local_tokens
        self._spread = itertools.count()
        self._ended = asyncio.Event()  # a request has, since somebody began to wait
        self.draining = False  # nothing new is accepted
        self.statistics = RouterStatistics()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta | Summary, None]:
        """Deltas as they come, then one Summary. Closing it early cancels the request everywhere.

        Raises InvalidRequest, QueueFull, Overloaded, Unavailable, DeadlineExceeded, SlowReader.
        """
        if self.draining:
            raise Draining(f"{self._router_id} is draining")
        run = _Run(request, self._tokenizer, self._members.require_identity(), router_id=self._router_id)
        failed_on: list[str] = []
        last_failure: Unavailable | ResourceExhausted | None = None
        with self._counted(run), self._admission.enter():
            while not run.is_finished:
                fleet = self._members.require_fleet()
                try:
                    route = self._route(run, fleet, excluded=failed_on)
                except PeerUnavailable:
                    if last_failure is not None:  # nobody is left to try: what the last one said is the reason
                        raise last_failure from None
                    raise
                run.attempts += 1
                try:
                    await failpoints.reach("router.before_start", request.request_id)
                    with self._started(run, fleet, route) as (stream, item):
                        await failpoints.reach("router.started", request.request_id)
                        while not run.is_finished:
                            arrivals = await stream.next_arrivals()
                            await failpoints.reach("router.mid_decode", request.request_id)
                            if run.first_token_at is None:
                                self._first_token(run, fleet, item, route, stream)
                                await failpoints.reach("router.first_token", request.request_id)
                            for arrival in arrivals:
                                if (delta := run.take(arrival)) is not None:
                                    self.statistics.output_tokens += len(delta.token_ids)
                                    yield delta
                except (Unavailable, ResourceExhausted) as failure:
                    # Another worker may do it, unless text has been shown.
                    last_failure = failure
                    failed_on.append(route.decode_worker_id)
                    if run.completion_tokens or run.attempts >= MAX_ATTEMPTS:
                        raise
            await failpoints.reach("router.at_end", request.request_id)
            summary = run.summary()
            self._note_pace(run, summary)
            yield summary

    @contextlib.contextmanager
    def _counted(self, run: "_Run") -> Iterator[None]:
        """Counts a request once as accepted and once as whatever became of it; one that is refused before any work only as shed."""
        statistics = self.statistics
        statistics.accepted += 1
        try:
            yield
        except (DeadlineExceeded, asyncio.CancelledError, GeneratorExit):
            statistics.cancelled += 1
            raise
        except (ResourceExhausted, Unavailable):
            if run.attempts:
                statistics.failed += 1
            else:
                statistics.accepted -= 1
                statistics.shed += 1
            raise
        except BaseException:
            statistics.failed += 1
            raise
        else:
            statistics.finished += 1
        finally:
            self._ended.set()

    async def wait_idle(self) -> None:
        """Until no accepted request is left."""
        while self.statistics.in_flight:
            self._ended.clear()
            await self._ended.wait()

    def _route(self, run: "_Run", fleet: Fleet, *, excluded: Sequence[str]) -> Route:
        """Chooses workers by the prefixes they hold and the load they have; see policy."""
        started = time.perf_counter()
        request = run.request
        hashes = run.block_hashes()
        remaining_s = run.remaining_s()
        index = self._replica.index
        route = choose(
            RouteRequest(
                prompt_tokens=len(request.prompt_token_ids),
                max_output_tokens=run.sampling.max_tokens,
                num_choices=run.sampling.n,
                ttft_limit_s=self._admission.ttft_limit_s(remaining_s),
                spread=next(self._spread),
                excluded=excluded,
                max_local_tokens=self._max_local_tokens,
            ),
            index.match(hashes),
            fleet.view(time.monotonic(), index.worker_ids),
        )
        self._admission.check(route, remaining_s=remaining_s)
        run.route_s += time.perf_counter() - started
        run.route = route
        return route

    @contextlib.contextmanager
    def _started(self, run: "_Run", fleet: Fleet, route: Route) -> Iterator[tuple[RequestStream, InFlight]]:
        """Has the request run on the route's workers; whatever ends it, they and the fleet's books hear of it."""
        session = self._members.session(route.decode_worker_id)
        num_choices = run.sampling.n
        stream = RequestStream(prompt_tokens=len(run.request.prompt_token_ids), num_choices=num_choices)
        item = fleet.dispatched(route, time.monotonic())
        blamed: tuple[str, ...] = ()
        handle: int | None = None
        try:
            run.sent_at = time.perf_counter()
            handle = session.start(self._start(run, route), stream, num_choices)
            yield stream, item
        except (Unavailable, ResourceExhausted):
            blamed = (route.decode_worker_id,)
            raise
        finally:
            if handle is not None:
                session.cancel(handle, stream, num_choices)
            if run.is_finished:
                fleet.finished(item, time.monotonic(), output_tokens=run.completion_tokens)
            else:
                fleet.failed(item, time.monotonic(), blamed=blamed)

    def _start(self, run: "_Run", route: Route) -> decode_pb2.Start:
        candidates = []
        for worker_id in route.prefill_worker_ids:
            address = self._members.address(worker_id)
            if address is not None:
                candidates.append(decode_pb2.PrefillCandidate(worker_id=worker_id, address=address))
        return decode_pb2.Start(
            request_id=run.request.request_id,
            attempt=run.attempts,
            remaining_s=max(run.remaining_s() or 0.0, 0.0),
            token_ids=common_pb2.TokenIds(packed=run.packed_prompt),
            sampling=convert.sampling_to_proto(run.sampling),
            prefix_key=run.prefix_key,
            candidates=candidates,
            local_prefill_tokens=route.local_prefill_tokens,
            trace_context=run.request.trace_context,
        )

    def _first_token(self, run: "_Run", fleet: Fleet, item: InFlight, route: Route, stream: RequestStream) -> None:
        """Teaches the cost model, and the replica where it was wrong; counts."""
        run.first_token_at = time.perf_counter()
        facts = run.prefilled = stream.prefilled or decode_pb2.Prefilled()
        prompt_tokens = len(run.request.prompt_token_ids)
        is_remote = bool(facts.prefill_worker_id)
        cached_tokens = facts.prefill_cached_tokens if is_remote else facts.decode_cached_tokens
        outcome = PrefillOutcome(
            worker_id=facts.prefill_worker_id or route.decode_worker_id,
            decode_queue_s=facts.decode_queue_s,
            queue_s=facts.prefill_queue_s,
            prefill_s=facts.prefill_s,
            new_tokens=prompt_tokens - cached_tokens,
            cached_tokens=cached_tokens,
            transfer_s=facts.transfer_s,
            tail_s=facts.transfer_tail_s,
            kv_blocks=facts.kv_blocks,
        )
        fleet.prefill_done(item, outcome, time.monotonic())
        statistics = self.statistics
        statistics.prompt_tokens += prompt_tokens
        statistics.cached_tokens += cached_tokens
        statistics.kv_bytes += facts.kv_bytes
        statistics.ttft.add(run.first_token_at - run.request.received_at)
        self._correct(run, route.decode_worker_id, route.decode_cached_tokens, facts.decode_cached_tokens)
        predicted = dict(zip(route.prefill_worker_ids, route.prefill_cached_tokens, strict=True))
        if facts.prefill_worker_id in predicted:
            self._correct(run, facts.prefill_worker_id, predicted[facts.prefill_worker_id], facts.prefill_cached_tokens)

    def _correct(self, run: "_Run", worker_id: str, predicted_tokens: int, cached_tokens: int) -> None:
        """What the replica said of a worker, and was not so, is not believed again until the worker says it anew.

        Only what was said when the request was routed: blocks that have been stored there since are none of this request's business.
        """
        block_size = run.identity.block_size
        missing = run.block_hashes()[cached_tokens // block_size : predicted_tokens // block_size]
        if missing:
            self._replica.index.disown(worker_id, missing)

    def _note_pace(self, run: "_Run", summary: Summary) -> None:
        if summary.completion_tokens > run.sampling.n:
            # Choices run side by side: tokens of one choice.
            decode_s = summary.timing.total_s - summary.timing.ttft_s
            self.statistics.tpot.add(decode_s / (summary.completion_tokens / run.sampling.n - 1))


class _Run:
    """State of one request over all its attempts. Raises InvalidRequest when it can never be served."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer, identity: common_pb2.ModelIdentity, *, router_id: str) -> None:
        self.request = request
        self.identity = identity
        self.sampling = _complete(request, identity)
        self.packed_prompt = convert.pack_u32(request.prompt_token_ids)
        self.prefix_key = prefix_key(model_fingerprint=identity.model_fingerprint, salt=request.cache_salt)
        self.route: Route | None = None
        self.attempts = 0
        self.route_s = 0.0
        self.sent_at = 0.0
        self.first_token_at: float | None = None
        self.prefilled = decode_pb2.Prefilled()
        self.completion_tokens = 0
        self._router_id = router_id
        self._hashes: list[bytes] | None = None
        self._open_choices = set(range(self.sampling.n))
        self._texts = [
            ChoiceText(tokenizer.detokenizer(), stop=request.stop, min_tokens=self.sampling.min_tokens) for _ in range(self.sampling.n)
        ]

    @property
    def is_finished(self) -> bool:
        return not self._open_choices

    def remaining_s(self) -> float | None:
        """Until the deadline; None: there is none. Raises DeadlineExceeded when it has passed."""
        if self.request.remaining_s is None:
            return None
        remaining_s = self.request.remaining_s - (time.perf_counter() - self.request.received_at)
        if remaining_s <= 0:
            raise DeadlineExceeded("the deadline has passed")
        return remaining_s

    def block_hashes(self) -> list[bytes]:
        """Of all full blocks of the prompt."""
        if self._hashes is None:
            self._hashes = chain_hashes(self.prefix_key, self.packed_prompt, self.identity.block_size)
        return self._hashes

    def take(self, arrival: Arrival) -> Delta | None:
        """Turns tokens into text; None for a choice that a stop string has ended already."""
        if arrival.choice not in self._open_choices:
            return None
        choice, token_ids, logprobs, finish_reason = arrival
        text, num_tokens, finish_reason = self._texts[choice].push(token_ids, finish_reason)
        self.completion_tokens += num_tokens
        if finish_reason is not None:
            self._open_choices.discard(choice)
        return Delta(choice, text, token_ids[:num_tokens], logprobs[:num_tokens], finish_reason)

    def summary(self) -> Summary:
        now = time.perf_counter()
        request, facts, route = self.request, self.prefilled, self.route
        assert route is not None
        first_token_at = self.first_token_at or now
        predicted = route.decode_cached_tokens if route.is_local else route.prefill_cached_tokens[0]
        timing = inference_pb2.RequestTiming(
            request_id=request.request_id,
            router_id=self._router_id,
            decode_worker_id=route.decode_worker_id,
            prefill_worker_id=facts.prefill_worker_id,
            route_reason=route.explain(),
            seed=self.sampling.seed,
            tokenize_s=request.tokenize_s,
            route_s=self.route_s,
            decode_queue_s=facts.decode_queue_s,
            prefill_queue_s=facts.prefill_queue_s,
            prefill_s=facts.prefill_s,
            model_s=facts.model_s,
            transfer_tail_s=facts.transfer_tail_s,
            transfer_s=facts.transfer_s,
            route_to_first_token_s=first_token_at - self.sent_at,
            ttft_s=first_token_at - request.received_at,
            total_s=now - request.received_at,
            decode_cached_tokens=facts.decode_cached_tokens,
            prefill_cached_tokens=facts.prefill_cached_tokens,
            predicted_cached_tokens=predicted,
            predicted_ttft_s=route.predicted_ttft_s,
            kv_transport=facts.kv_transport,
            kv_blocks=facts.kv_blocks,
            kv_bytes=facts.kv_bytes,
            attempts=self.attempts,
        )
        cached_tokens = facts.prefill_cached_tokens if facts.prefill_worker_id else facts.decode_cached_tokens
        return Summary(
            prompt_tokens=len(request.prompt_token_ids),
            completion_tokens=self.completion_tokens,
            cached_tokens=cached_tokens,
            timing=timing,
        )


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
