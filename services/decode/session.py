"""One router's session: its commands become engine requests, the engine's events become step frames.

    Start ─▶ reserve ─▶ prefilling elsewhere ─▶ landed ─┐
        └──▶ submit (prompt computed here) ─────────────┴▶ decoding ─▶ ended
    Cancel, deadline, end of the session: from any state, fence first when a peer may be writing

A request is known by its handle; choice i of it is handle + i. Everything here runs on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field

from protos.baton.v1 import decode_pb2
from services.core.clock import unix_s
from services.core.errors import BatonError, DeadlineExceeded, Draining, InvalidRequest, PeerUnavailable, ResourceExhausted
from services.core.types import TokenEvent
from services.decode.frames import FrameBuilder
from services.decode.remote_prefill import PrefillClient, PrefillFailed
from services.engine.events import Event, PrefillProgress, Reserved
from services.engine.sequence import EngineRequest
from services.mesh import convert, failpoints, status
from services.mesh.kv_transport import IncomingTransfer
from services.mesh.streams import HEARTBEAT_S, SILENCE_S, Listening
from services.worker.runtime import Worker

# A router that has not read this many tokens has stopped reading.
MAX_UNREAD_TOKENS = 1 << 16
LOAD_INTERVAL_S = 0.05
# Of prefill workers to try for one request; a router names four.
MAX_CANDIDATES = 16

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class RunningRequest:
    """State of one request in this session."""

    start: decode_pb2.Start
    engine_id: str
    num_tokens: int  # to be computed before the first new one
    open_choices: set[int]
    deadline: asyncio.TimerHandle | None = None
    prefilling: asyncio.Task[None] | None = None  # while a peer computes the prompt, and until it is fenced
    prefilled: decode_pb2.Prefilled = field(default_factory=decode_pb2.Prefilled)
    ready_at: float = 0.0  # time.perf_counter() since when the prompt could be computed, by the next one to try

    def note_failed_prefill(self) -> None:
        """Somebody else has to compute the prompt."""
        now = time.perf_counter()
        self.prefilled.prefill_retry_s += now - self.ready_at
        self.ready_at = now


class RouterSession:
    """Requests of one router on one worker. Task group and closing are its servicer's."""

    def __init__(self, worker: Worker, prefill: PrefillClient, tasks: asyncio.TaskGroup, *, name: str) -> None:
        self._worker = worker
        self._prefill = prefill
        self._tasks = tasks
        self._name = name
        self._by_handle: dict[int, RunningRequest] = {}
        self._by_engine_id: dict[str, RunningRequest] = {}
        self._last_handle = -1
        self._frame = FrameBuilder()
        self._wake = asyncio.Event()
        self._written = asyncio.Event()  # a frame has been, or the session has ended
        self._listening = Listening()
        self._ended = False
        self._is_writing = self._is_cut_off = False
        self._load_sent_at = 0.0

    async def wait_idle(self) -> None:
        """Until there is no request, and nothing that the router has not been sent; or until the session has ended."""
        while not self._ended and (self._by_handle or self._is_writing or not self._frame.is_empty):
            self._written.clear()
            await self._written.wait()

    async def obey(self, commands: AsyncIterator[decode_pb2.SessionCommand]) -> None:
        """Carries out the router's commands until it closes its side."""
        try:
            async for command in commands:
                self._listening.heard()
                match command.WhichOneof("kind"):
                    case "start":
                        self._start(command.start)
                    case "cancel":
                        self._cancel(command.cancel.handle)
                    case "heartbeat":
                        pass
                    case _:
                        raise InvalidRequest("kind", "only start, cancel and heartbeat follow hello")
        finally:
            self._ended = True
            self._wake.set()
            self._written.set()

    async def watch_silence(self) -> None:
        """Raises PeerUnavailable when the router has said nothing for SILENCE_S: frozen or cut off, it must not keep blocks here."""
        await self._listening.wait_silence()
        self._is_cut_off = True
        raise PeerUnavailable(f"the router has said nothing for {SILENCE_S} s")

    async def frames(self) -> AsyncGenerator[decode_pb2.StepFrame, None]:
        """A frame whenever there is something to say, else one each HEARTBEAT_S; ends with the router's side."""
        while not self._ended:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            now = time.monotonic()
            # The first token of a request that is alone does not wait, on either side, for a load that says no more than that.
            is_urgent = self._frame.has_first_tokens and len(self._by_handle) <= 1
            is_load_due = now - self._load_sent_at >= (HEARTBEAT_S / 2 if is_urgent else LOAD_INTERVAL_S)
            if is_load_due:
                self._load_sent_at = now
            if is_load_due or not self._frame.is_empty:
                self._is_writing = True
                yield self._frame.take(self._worker.load() if is_load_due else None)
                self._is_writing = False
                self._written.set()

    def close(self) -> None:
        """Aborts everything that still runs."""
        for request in list(self._by_handle.values()):
            self._drop(request)

    def _start(self, start: decode_pb2.Start) -> None:
        if start.handle <= self._last_handle:
            raise InvalidRequest("handle", f"{start.handle} is in use or was used; the last one was {self._last_handle}")
        try:
            if self._worker.draining:
                raise Draining(f"{self._worker.worker_id} is draining")
            self._admit(start)
        except BatonError as error:
            self._last_handle = max(self._last_handle, start.handle)
            self._end_with_error(start, error, handle=start.handle)

    def _admit(self, start: decode_pb2.Start) -> None:
        failpoints.hit("decode.started", start.request_id)
        sampling = convert.sampling_from_proto(start.sampling)
        if start.handle + sampling.n - 1 > convert.MAX_U32:
            raise InvalidRequest("handle", f"{start.handle} leaves no handles for {sampling.n} choices", limit=convert.MAX_U32)
        if len(start.candidates) > MAX_CANDIDATES:
            raise InvalidRequest("candidates", f"are {len(start.candidates)}, more than {MAX_CANDIDATES}", limit=MAX_CANDIDATES)
        token_ids = convert.token_ids_from_proto(start.token_ids, "token_ids")
        prompt, output = convert.split_prompt(token_ids, start.prompt_length)
        engine_request = EngineRequest(
            request_id=f"{self._name}/{start.handle}",
            prompt_token_ids=prompt,
            sampling=sampling,
            prefix_key=start.prefix_key or None,
            output_token_ids=output,
        )
        engine = self._worker.engine
        if start.candidates:
            engine.reserve(engine_request, listener=self._hear)
        else:
            engine.submit(engine_request, listener=self._hear)
        self._last_handle = start.handle + sampling.n - 1
        request = RunningRequest(
            start=start, engine_id=engine_request.request_id, num_tokens=len(token_ids), open_choices=set(range(sampling.n))
        )
        request.prefilled.handle = start.handle
        self._by_handle[start.handle] = self._by_engine_id[request.engine_id] = request
        if start.remaining_s > 0:
            request.deadline = asyncio.get_running_loop().call_later(start.remaining_s, self._expire, request)

    def _cancel(self, handle: int) -> None:
        request = self._by_handle.get(handle)
        if request is not None:  # else it ended while the command was on its way
            self._drop(request)

    def _expire(self, request: RunningRequest) -> None:
        self._fail(request, DeadlineExceeded(f"the deadline of {request.start.remaining_s:.3f} s has passed"))

    def _fail(self, request: RunningRequest, error: BaseException) -> None:
        # The first choice may have ended: the router has forgotten its handle.
        self._end_with_error(request.start, error, handle=request.start.handle + min(request.open_choices))
        self._drop(request)

    def _end_with_error(self, start: decode_pb2.Start, error: BaseException, *, handle: int) -> None:
        self._frame.add_error(handle, status.to_proto(error, start.request_id))
        self._wake.set()

    def _forget(self, request: RunningRequest) -> None:
        self._by_handle.pop(request.start.handle, None)
        self._by_engine_id.pop(request.engine_id, None)
        if request.deadline is not None:
            request.deadline.cancel()

    def _drop(self, request: RunningRequest) -> None:
        """Forgets a request and frees what it has; one that a peer prefills is freed by its own task, behind the fence."""
        self._forget(request)
        if request.prefilling is not None:
            request.prefilling.cancel()
        else:
            self._worker.engine.abort(request.engine_id)

    def _hear(self, events: Sequence[Event]) -> None:
        """What the engine made in one step, for all requests of this session."""
        for event in events:
            if isinstance(event, TokenEvent):
                self._hear_token(event)
            elif isinstance(event, Reserved):
                self._hear_reserved(event)
            elif not isinstance(event, PrefillProgress):
                for request in list(self._by_handle.values()):
                    self._fail(request, event)
        if not self._frame.is_empty:
            # A load that has changed is not worth a frame that would compete with the call to a prefill worker.
            self._wake.set()
        if self._frame.num_tokens > MAX_UNREAD_TOKENS and not self._is_cut_off:
            # Not where frames are made: that stands still in the write that the router does not take.
            self._is_cut_off = True
            self._tasks.create_task(self._cut_off(self._frame.num_tokens))

    async def _cut_off(self, num_tokens: int) -> None:
        """Ends the session by failing in its task group."""
        raise ResourceExhausted(f"{num_tokens} tokens were not read; at most {MAX_UNREAD_TOKENS} are kept")

    def _hear_token(self, event: TokenEvent) -> None:
        request = self._by_engine_id.get(event.request_id)
        if request is None or event.token_id is None:
            return  # dropped a moment ago
        failpoints.hit("decode.mid_decode", request.start.request_id)
        if event.prefill is not None:
            facts, timing = request.prefilled, event.prefill
            facts.decode_cached_tokens = event.cached_tokens
            facts.model_s = timing.model_s
            facts.prefill_s = timing.prefill_s
            facts.first_token_unix_s = unix_s(timing.sampled_at)
            if request.start.candidates:
                # After the wait for its place, which Reserved has told; from there by way of this loop and back to the engine.
                facts.prefill_queue_s = timing.began_at - request.ready_at
            else:
                facts.to_decode_s = unix_s(timing.queued_at) - request.start.sent_unix_s
                facts.decode_queue_s = timing.queue_s
            self._frame.add_prefilled(facts)
        self._frame.add_token(request.start.handle + event.choice, event)
        if event.finish_reason is not None:
            request.open_choices.discard(event.choice)
            if not request.open_choices:
                failpoints.hit("decode.at_end", request.start.request_id)
                self._forget(request)

    def _hear_reserved(self, event: Reserved) -> None:
        request = self._by_engine_id.get(event.request_id)
        if request is None or self._ended or self._is_cut_off:
            return  # dropped a moment ago, or about to be; its abort is on the way to the engine
        failpoints.hit("decode.reserved", request.start.request_id)
        request.ready_at = event.reserved_at
        request.prefilled.to_decode_s = unix_s(event.reserved_at - event.queue_s) - request.start.sent_unix_s
        request.prefilled.decode_queue_s = event.queue_s
        request.prefilled.decode_cached_tokens = event.num_cached_tokens
        if request.num_tokens - event.num_cached_tokens <= request.start.local_prefill_tokens:
            self._worker.engine.compute_here(request.engine_id, num_landed_tokens=event.num_cached_tokens)
            return
        request.prefilling = self._tasks.create_task(self._prefill_elsewhere(request, event))
        request.prefilling.add_done_callback(lambda task: self._abort_if_cancelled(request, task))

    def _abort_if_cancelled(self, request: RunningRequest, prefilling: asyncio.Task[None]) -> None:
        """Frees what a cancelled prefill held; here, for a task that is cancelled before its first step has no `finally`."""
        if prefilling.cancelled():
            self._worker.engine.abort(request.engine_id)

    async def _prefill_elsewhere(self, request: RunningRequest, reserved: Reserved) -> None:
        """Tries the candidates in order; what none of them could do is computed here. Cancelled, it leaves nobody who may still write."""
        engine, groups = self._worker.engine, self._worker.groups
        first_block = reserved.num_cached_tokens // groups.block_size
        for attempt, candidate in enumerate(request.start.candidates, start=1):
            places = groups.places(request.num_tokens, first_block)
            if not places:
                break  # all blocks came, and no first token
            block_ids = reserved.block_ids[len(reserved.block_ids) - len(places) :]
            request.prefilled.prefill_attempts = attempt
            try:
                outcome = await self._prefill.run(request.start, candidate, block_ids, first_block=first_block, ready_at=request.ready_at)
            except PrefillFailed as failure:
                request.note_failed_prefill()
                cause = failure.__cause__
                is_cancelled = isinstance(cause, asyncio.CancelledError)
                if failure.unfenced is not None:
                    self._quarantine(request, failure.unfenced, abort=is_cancelled)
                    if is_cancelled:
                        raise asyncio.CancelledError from failure
                    request.prefilling = None
                    return
                if is_cancelled:
                    raise asyncio.CancelledError from failure
                missing = places[failure.num_landed :]
                first_block = missing[0].block if missing else groups.num_blocks(request.num_tokens)
                # Also one that calls the request invalid: the engine here, which would decode it, has found it valid.
                if not isinstance(cause, BatonError):
                    request.prefilling = None
                    self._fail(request, cause or failure)
                    return
                _log.warning("prefill on %s failed: %s", candidate.worker_id, cause.message, extra={"request_id": request.start.request_id})
                continue
            try:
                engine.landed(request.engine_id, outcome.first_tokens)
            except InvalidRequest as error:
                request.note_failed_prefill()
                _log.warning("%s gave a result that cannot be: %s", candidate.worker_id, error.message)
                continue
            request.prefilling = None
            request.prefilled.MergeFrom(outcome.facts)
            self._worker.kv_bytes_received += outcome.facts.kv_bytes
            self._frame.add_prefilled(request.prefilled)  # before the tokens, which the engine tells later
            return
        request.prefilling = None
        engine.compute_here(request.engine_id, num_landed_tokens=first_block * groups.block_size)

    def _quarantine(self, request: RunningRequest, transfer: IncomingTransfer, *, abort: bool) -> None:
        """Takes the blocks that a silent peer may still write into out of circulation, until it is fenced."""
        block_ids = self._worker.engine.quarantine(request.engine_id, abort=abort)
        _log.warning("%d KV blocks quarantined", len(block_ids), extra={"request_id": request.start.request_id})
        self._worker.lift_quarantine_later(block_ids, transfer.wait_fenced)
