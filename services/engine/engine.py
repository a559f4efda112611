"""The engine as an event loop sees it: submit a request, stream its events, abort it. One thread owns torch; the loop never waits for it.

    loop thread                              engine thread
    submit ─ command ─▶ inbox ─▶ core.add
    abort  ─ command ─▶ inbox ─▶ core.abort
    stream ◀─ one wake-up per step ── core.step ── events

Knows nothing of the network. All public calls are made on one event loop.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Self

from services.core.errors import EngineStopped, InvalidRequest, QueueFull, UnknownRequest
from services.core.types import FinishReason, TokenEvent
from services.engine.core import EngineCore, EngineStats
from services.engine.sequence import EngineRequest

_log = logging.getLogger(__name__)


class _Stream:
    """Events of one request on their way to its reader; bounded by the request's own number of tokens."""

    def __init__(self, num_choices: int) -> None:
        self.events: asyncio.Queue[TokenEvent | EngineStopped] = asyncio.Queue()
        self.unfinished = set(range(num_choices))  # choices whose end has not been put into `events`


class Engine:
    """`async with Engine(core) as engine`. Leaving closes it: running requests end with EngineStopped."""

    def __init__(self, core: EngineCore, *, max_num_requests: int) -> None:
        self._core = core
        self._max_num_requests = max_num_requests
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: stop
        self._streams: dict[str, _Stream] = {}
        # Ids of aborted requests that the running step may still compute for: nobody else may have them yet.
        self._aborting: set[str] = set()
        self._stopped: EngineStopped | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._inbox.put(None)
        try:
            await asyncio.to_thread(self._thread.join)
        finally:
            self._end_streams(EngineStopped("the engine is closed"))

    @property
    def max_model_len(self) -> int:
        return self._core.max_model_len

    @property
    def vocab_size(self) -> int:
        return self._core.vocab_size

    def submit(self, request: EngineRequest) -> None:
        """Takes a request in; its events come from stream().

        Raises InvalidRequest for what could never be served, QueueFull when the engine holds max_num_requests, EngineStopped.
        """
        if self._stopped:
            raise self._stopped
        self._core.validate(request)
        if request.request_id in self._streams or request.request_id in self._aborting:
            raise InvalidRequest("request_id", f"{request.request_id!r} is in use")
        if len(self._streams) >= self._max_num_requests:
            raise QueueFull(f"{len(self._streams)} requests are running or waiting, which is the limit")
        self._streams[request.request_id] = _Stream(request.sampling.n)
        self._inbox.put(lambda: self._core.add(request))

    async def stream(self, request_id: str) -> AsyncGenerator[TokenEvent, None]:
        """The request's events until all its choices have ended; to be read once. Leaving early aborts the request.

        Raises UnknownRequest, and EngineStopped when the engine ends first.
        """
        stream = self._streams.get(request_id)
        if stream is None:
            raise self._stopped or UnknownRequest(f"no request {request_id!r} is running here")
        try:
            while stream.unfinished or not stream.events.empty():
                event = await stream.events.get()
                if isinstance(event, EngineStopped):
                    raise event
                yield event
        finally:
            self._abort(request_id, stream)

    def abort(self, request_id: str) -> None:
        """Ends a request: its stream ends now, with an ABORT for each open choice, and its blocks are free after the running step.

        Until then the id stays in use. Unknown ids are ignored.
        """
        if stream := self._streams.get(request_id):
            self._abort(request_id, stream)

    def _abort(self, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is not stream:
            return
        del self._streams[request_id]
        if not stream.unfinished:
            return
        for choice in sorted(stream.unfinished):
            stream.events.put_nowait(
                TokenEvent(
                    request_id=request_id,
                    choice=choice,
                    token_id=None,
                    position=None,
                    logprobs=None,
                    finish_reason=FinishReason.ABORT,
                    cached_tokens=0,
                )
            )
        stream.unfinished.clear()
        self._aborting.add(request_id)

        def drop() -> None:
            self._core.abort(request_id)
            self._loop.call_soon_threadsafe(self._aborting.discard, request_id)

        self._inbox.put(drop)

    def stats(self) -> EngineStats:
        """A snapshot; while a step runs some of its counters may be one step apart."""
        return self._core.stats()

    def _run(self) -> None:
        """The engine thread: commands between steps, steps while there is work."""
        try:
            while self._obey(wait=not self._core.has_work):
                if self._core.has_work:
                    events = self._core.step()
                    if events:
                        self._loop.call_soon_threadsafe(self._deliver, events)
        except Exception:
            # Whatever broke, no request may hang: they all learn that the engine is gone, and the details stay in the log.
            _log.exception("the engine thread died")
            self._loop.call_soon_threadsafe(self._end_streams, EngineStopped("the engine failed"))

    def _obey(self, *, wait: bool) -> bool:
        """Carries out all commands that have come in, waiting for one if there is nothing else to do. False: stop."""
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:  # else aborted while the step ran
                if event.finish_reason is not None:
                    stream.unfinished.discard(event.choice)
                stream.events.put_nowait(event)

    def _end_streams(self, reason: EngineStopped) -> None:
        self._stopped = self._stopped or reason
        for stream in self._streams.values():
            stream.events.put_nowait(self._stopped)
        self._streams.clear()
