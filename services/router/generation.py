"""One request from its tokens to its text: admitted, routed, started on a decode worker, followed until every choice has ended.

The one path under every face of the router (gRPC, HTTP). What happens to a request is decided here; how it is written down for a client is
not known here, and neither is how a worker is reached.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial

from protos.baton.v1 import common_pb2, decode_pb2
from services.core.errors import (
    DeadlineExceeded,
    Draining,
    Incompatible,
    InvalidRequest,
    OutOfBlocks,
    PeerUnavailable,
    ResourceExhausted,
    Unavailable,
)
from services.mesh import convert, failpoints
from services.mesh.index_client import IndexReplica
from services.router.admission import Admission, Place
from services.router.decode_session import DecodeSession, RequestStream
from services.router.fleet import Fleet, InFlight, PrefillOutcome
from services.router.members import Members
from services.router.policy import choose
from services.router.request import GenerationRequest, Piece, PromptLogprobs, Summary
from services.router.route import Route, RouteRequest
from services.router.run import Part, Run
from services.router.statistics import RouterStatistics
from services.tokenizer.tokenizer import Tokenizer

# Between looks for a worker, when there is none for a request that has been accepted.
RETRY_S = 0.1
# What an attempt may end with that another worker may do better. The request was found valid here: a worker that does not is another one.
WORKER_FAILURES = (Unavailable, ResourceExhausted, InvalidRequest, Incompatible)

_log = logging.getLogger(__name__)


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
        recovery_s: float,
    ) -> None:
        self._members = members
        self._replica = replica
        self._tokenizer = tokenizer
        self._admission = admission
        self._router_id = router_id
        self._max_local_tokens = max_local_tokens
        self._recovery_s = recovery_s
        self._spread = itertools.count()
        self._ended = asyncio.Event()  # a request has, since somebody began to wait
        self.draining = False  # nothing new is accepted
        self.statistics = RouterStatistics()
        self._lessons: dict[InFlight, Callable[[], None]] = {}  # of first tokens that have come a moment ago

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """PromptLogprobs if they are wanted, Deltas as they come, then one Summary. Closing it early cancels the request everywhere.

        A worker that fails is not seen: another one goes on from the tokens that have come.
        Raises InvalidRequest, QueueFull, Overloaded, Unavailable, DeadlineExceeded, SlowReader.
        """
        if self.draining:
            raise Draining(f"{self._router_id} is draining")
        identity = self._members.require_identity()
        run = Run(request, self._tokenizer, identity, router_id=self._router_id, recovery_s=self._recovery_s)
        with self._counted(run), self._admission.enter() as place:
            while not run.is_finished:
                fleet, route = await self._next_route(run)
                try:
                    await failpoints.reach("router.before_start", request.request_id)
                    with self._started(run, fleet, route, place) as (stream, item, start_rest):
                        await failpoints.reach("router.started", request.request_id)
                        is_told = False
                        while not run.is_finished:
                            arrivals = await stream.next_arrivals()
                            await failpoints.reach("router.mid_decode", request.request_id)
                            if not is_told:
                                is_told = True
                                self._first_token(run, fleet, item, stream)
                                start_rest()
                                await failpoints.reach("router.first_token", request.request_id)
                                if stream.prompt_logprobs is not None and not run.prompt_logprobs_told:
                                    run.prompt_logprobs_told = True
                                    yield PromptLogprobs(stream.prompt_logprobs)
                                run.stages.shown()
                            for arrival in arrivals:
                                if (delta := run.take(arrival)) is not None:
                                    self.statistics.output_tokens += len(delta.token_ids)
                                    yield delta
                except WORKER_FAILURES as failure:
                    run.stages.failed()
                    run.failures.note(route.decode_worker_id, failure, num_tokens=run.completion_tokens)
                    _log.warning(
                        "attempt %d on %s failed after %d tokens: %s",
                        run.attempts,
                        route.decode_worker_id,
                        run.completion_tokens,
                        failure.message,
                        extra={"request_id": request.request_id},
                    )
            await failpoints.reach("router.at_end", request.request_id)
            summary = run.summary()
            self._note_pace(run, summary)
            yield summary

    @contextlib.contextmanager
    def _counted(self, run: Run) -> Iterator[None]:
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

    async def _next_route(self, run: Run) -> tuple[Fleet, Route]:
        """Where the request goes next; waits for a worker if it has been accepted and there is none."""
        while True:
            try:
                fleet = self._members.require_fleet()
                if convert.first_difference(run.identity, self._members.require_identity()) is not None:
                    raise PeerUnavailable("the model with which this request began is not served here any more")
                return fleet, self._route(run, fleet)
            except (PeerUnavailable, OutOfBlocks) as error:  # whoever has room may come back, too
                run.failures.nobody_left(error)
            await asyncio.sleep(RETRY_S)

    def _route(self, run: Run, fleet: Fleet) -> Route:
        """Chooses workers by the prefixes they hold and the load they have; see policy."""
        run.stages.routing()
        remaining_s = run.remaining_s()
        index = self._replica.index
        # Scoring a prompt takes all its logits, so that nothing of it is of use in a cache, and they are made where it goes on.
        is_scored = run.sampling.prompt_logprobs is not None and not run.prompt_logprobs_told
        route = choose(
            RouteRequest(
                prompt_tokens=run.num_tokens,
                max_output_tokens=run.sampling.max_tokens,
                num_choices=run.num_open,
                ttft_limit_s=self._admission.ttft_limit_s(remaining_s),
                spread=next(self._spread),
                excluded=run.failures.excluded,
                max_local_tokens=self._max_local_tokens,
                must_be_local=is_scored,
            ),
            [] if is_scored else index.match(run.block_hashes()),
            fleet.view(time.monotonic(), index.worker_ids),
        )
        if not run.attempts:  # what has been accepted is finished
            self._admission.check(route, remaining_s=remaining_s)
        return route

    @contextlib.contextmanager
    def _started(self, run: Run, fleet: Fleet, route: Route, place: Place) -> Iterator[tuple[RequestStream, InFlight, Callable[[], None]]]:
        """Has the request run on the route's workers; whatever ends it, they and the fleet's books hear of it.

        The function is to be called when the first token has come: choices that go on one by one find their prompt cached then, where at
        once each of them would take room for all of it.
        """
        run.attempts += 1
        run.decode_worker_id = route.decode_worker_id
        item = fleet.dispatched(route, time.monotonic())
        blamed: tuple[str, ...] = ()
        session: DecodeSession | None = None

        def give_up() -> None:
            # Its client may never read again, and would keep others out and the worker busy.
            assert session is not None
            session.cancel(stream)
            place.leave()

        stream = RequestStream(run.next_positions(), on_slow_reader=give_up)
        try:
            session = self._members.session(route.decode_worker_id)
            first, *rest = run.parts()
            started = session
            started.start(self._start(run, first, route), stream, first.choices)

            def start_rest() -> None:
                for part in rest:
                    started.start(self._start(run, part, route), stream, part.choices)

            yield stream, item, start_rest
        except WORKER_FAILURES:
            blamed = (route.decode_worker_id,)
            raise
        finally:
            if session is not None:
                session.cancel(stream)
            self._learn_from(item)
            if run.is_finished:
                output_tokens = run.completion_tokens * route.num_choices // run.sampling.n
                fleet.finished(item, time.monotonic(), output_tokens=output_tokens)
            else:
                fleet.failed(item, time.monotonic(), blamed=blamed)

    def _start(self, run: Run, part: Part, route: Route) -> decode_pb2.Start:
        candidates = []
        for worker_id in route.prefill_worker_ids:
            address = self._members.address(worker_id)
            if address is not None:
                candidates.append(decode_pb2.PrefillCandidate(worker_id=worker_id, address=address))
        return decode_pb2.Start(
            request_id=run.request.request_id,
            attempt=run.attempts,
            remaining_s=max(run.remaining_s() or 0.0, 0.0),
            token_ids=common_pb2.TokenIds(packed=part.packed_tokens),
            prompt_length=run.prompt_tokens,
            sampling=convert.sampling_to_proto(part.sampling),
            prefix_key=run.prefix_key,
            candidates=candidates,
            local_prefill_tokens=route.local_prefill_tokens,
            trace_context=run.request.trace_context,
            sent_unix_s=run.stages.sent(),
        )

    def _first_token(self, run: Run, fleet: Fleet, item: InFlight, stream: RequestStream) -> None:
        """The first token of an attempt. What it teaches can wait until it is on its way to the client."""
        facts = stream.prefilled or decode_pb2.Prefilled()
        run.stages.token(facts)
        if run.route is None:
            run.prefilled, run.route = facts, item.route
            self._admission.note_first_token(item.route, time.monotonic() - item.dispatched_s)
            self.statistics.ttft.add(time.perf_counter() - run.request.received_at)
        self._lessons[item] = partial(self._learn, fleet, item, facts, time.monotonic(), run.block_hashes())
        asyncio.get_running_loop().call_soon(self._learn_from, item)

    def _learn_from(self, item: InFlight) -> None:
        """Once, and before the fleet hears of the end."""
        lesson = self._lessons.pop(item, None)
        if lesson is not None:
            lesson()

    def _learn(self, fleet: Fleet, item: InFlight, facts: decode_pb2.Prefilled, now_s: float, block_hashes: Sequence[bytes]) -> None:
        """What the first token of an attempt, which came at `now_s`, teaches the cost model, and the replica where it was wrong; counts."""
        route = item.route
        is_remote = bool(facts.prefill_worker_id)
        cached_tokens = facts.prefill_cached_tokens if is_remote else facts.decode_cached_tokens
        outcome = PrefillOutcome(
            worker_id=facts.prefill_worker_id or route.decode_worker_id,
            decode_queue_s=facts.decode_queue_s,
            queue_s=facts.prefill_queue_s,
            prefill_s=facts.prefill_s,
            new_tokens=route.prompt_tokens - cached_tokens,
            cached_tokens=cached_tokens,
            transfer_s=facts.transfer_s,
            tail_s=facts.transfer_tail_s,
            kv_blocks=facts.kv_blocks,
        )
        fleet.prefill_done(item, outcome, now_s)
        statistics = self.statistics
        statistics.prompt_tokens += route.prompt_tokens
        statistics.cached_tokens += cached_tokens
        statistics.kv_bytes += facts.kv_bytes
        found = {route.decode_worker_id: (facts.decode_cached_tokens, route.decode_cached_tokens)}
        predicted = dict(zip(route.prefill_worker_ids, route.prefill_cached_tokens, strict=True))
        if facts.prefill_worker_id in predicted:
            found[facts.prefill_worker_id] = facts.prefill_cached_tokens, predicted[facts.prefill_worker_id]
        for worker_id, (cached, expected) in found.items():
            self._correct(worker_id, block_hashes[cached // route.block_size : expected // route.block_size])

    def _correct(self, worker_id: str, missing: Sequence[bytes]) -> None:
        """What the replica said of a worker, and was not so, is not believed again until the worker says it anew.

        Only what was said when the request was routed: blocks that have been stored there since are none of this request's business.
        """
        if missing:
            self._replica.index.disown(worker_id, missing)

    def _note_pace(self, run: Run, summary: Summary) -> None:
        if summary.completion_tokens > run.sampling.n:
            # Choices run side by side: tokens of one choice.
            decode_s = summary.timing.total_s - summary.timing.ttft_s
            self.statistics.tpot.add(decode_s / (summary.completion_tokens / run.sampling.n - 1))
