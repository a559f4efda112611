"""Who hears of what: the requests that somebody waits for, and the listener of each. Lives on the event loop.

A process that runs hundreds of requests listens to all of them at once and is called once per engine step; one that reads a single
request has a listener of its own, an EventStream. Knows nothing of engines or threads.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from services.core.errors import EngineStopped
from services.core.types import FinishReason, TokenEvent
from services.engine.events import Event, Listener, Reserved
from services.engine.sequence import EngineRequest

_log = logging.getLogger(__name__)


class EventStream:
    """A listener whose events wait for one reader; bounded by the request's own number of tokens."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def __call__(self, events: Sequence[Event]) -> None:
        for event in events:
            self._events.put_nowait(event)

    async def next(self) -> Event:
        """The next event. Raises EngineStopped when the engine has ended first."""
        event = await self._events.get()
        if isinstance(event, EngineStopped):
            raise event
        return event


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request whose end has not been delivered.

    stream        where its events wait to be read, if that is how they are taken; it stays open until then
    open_choices  whose end has not been delivered
    reserved      what its listener was told to fill and has not yet answered for
    is_aborted    the core is to drop it, or has: nothing else may be asked of it
    """

    request: EngineRequest
    listener: Listener
    stream: EventStream | None
    open_choices: set[int]
    reserved: Reserved | None = None
    is_aborted: bool = False


class Delivery:
    """All open requests, by id."""

    def __init__(self) -> None:
        self._requests: dict[str, OpenRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, request_id: str) -> OpenRequest | None:
        return self._requests.get(request_id)

    def open(self, request: EngineRequest, listener: Listener | None) -> OpenRequest:
        """From now on the request's events go to `listener`, or wait in a stream of its own."""
        assert request.request_id not in self._requests
        stream = None
        if listener is None:
            listener = stream = EventStream()
        opened = OpenRequest(request, listener, stream, set(range(request.sampling.n)))
        self._requests[request.request_id] = opened
        return opened

    def close(self, opened: OpenRequest) -> bool:
        """Nothing more of it is delivered. False if it was closed already."""
        if self._requests.get(opened.request.request_id) is not opened:
            return False
        del self._requests[opened.request.request_id]
        return True

    def deliver(self, events: Sequence[Event]) -> None:
        """Calls each listener once, with its events in their order."""
        batches: dict[Listener, list[Event]] = {}
        for event in events:
            assert not isinstance(event, EngineStopped)
            opened = self._requests.get(event.request_id)
            if opened is None:
                continue  # aborted while the step ran
            batches.setdefault(opened.listener, []).append(event)
            if isinstance(event, Reserved):
                opened.reserved = event
            elif isinstance(event, TokenEvent) and event.finish_reason is not None:
                opened.open_choices.discard(event.choice)
                if not opened.open_choices and opened.stream is None:
                    del self._requests[event.request_id]
        for listener, batch in batches.items():
            _call(listener, batch)

    def end(self, reason: EngineStopped) -> None:
        """Tells every listener that all its requests have ended."""
        listeners = dict.fromkeys(opened.listener for opened in self._requests.values())
        self._requests.clear()
        for listener in listeners:
            _call(listener, [reason])


def abort_events(opened: OpenRequest) -> list[Event]:
    """The end of each choice that is still open."""
    return [
        TokenEvent(
            request_id=opened.request.request_id,
            choice=choice,
            token_id=None,
            position=None,
            logprobs=None,
            finish_reason=FinishReason.ABORT,
            cached_tokens=0,
        )
        for choice in sorted(opened.open_choices)
    ]


def _call(listener: Listener, events: list[Event]) -> None:
    try:
        listener(events)
    except Exception:
        # One listener's fault must not cost the others their events.
        _log.exception("a listener of the engine failed")
