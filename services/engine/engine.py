"""The engine as an event loop sees it: requests go in, events come out. One thread owns torch; the loop never waits for it.

    loop thread                                      engine thread
    submit, reserve, prefill ─ command ─▶ inbox ─▶ core.add             reserve: by the loop itself while the thread sleeps
    landed, compute_here, …  ─ command ─▶ inbox ─▶ core.landed, …
    listeners ◀────── one wake-up per step ─────── core.step ── events, changes of the prefix cache
        ◀── first tokens that came with the blocks, from the loop itself

A request whose prompt another engine computes is reserved here, and computed there by prefill(); somebody else copies the blocks.

    reserve ─▶ Reserved ─┬─ landed ────────▶ decoding, from the first tokens that came with the blocks
                         ├─ compute_here ──▶ prompt computed here, from the last block that has landed whole
                         ├─ quarantine ────▶ a peer may still write: other blocks, and the prompt computed here
                         └─ abort

Knows nothing of the network. All public calls are made on one event loop.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Self

from services.core.errors import EngineStopped, InvalidRequest, QueueFull, UnknownRequest
from services.core.types import SampledToken, TokenEvent
from services.engine.core import EngineCore
from services.engine.delivery import Delivery, EventStream, OpenRequest, abort_events
from services.engine.events import Event, Listener, OnBlocks, PrefillProgress, Reserved
from services.engine.sequence import EngineRequest, Purpose
from services.engine.stats import EngineStats

_log = logging.getLogger(__name__)
Command = Callable[[], object]


class Engine:
    """`async with Engine(core) as engine`. Leaving closes it: running requests end with EngineStopped.

    A listener is called on the loop, once for each step that made events for its requests and once for each landed(), never from inside
    a call of this class. Its
    last event is EngineStopped if the engine ends while it has requests. It must not raise.
    """

    def __init__(self, core: EngineCore, *, max_num_requests: int, on_blocks: OnBlocks | None = None) -> None:
        self._core = core
        self._max_num_requests = max_num_requests
        self._on_blocks = on_blocks
        if on_blocks:
            core.pool.track_changes()
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()  # None: stop
        self._at_work = threading.Lock()  # whoever has it may use the core: the engine thread, but while it sleeps
        self._delivery = Delivery()
        # Ids of requests that may have ended here, and of which the core has still to hear so: nobody else may have them yet.
        self._leaving: set[str] = set()
        self._quarantined: set[int] = set()
        self._stopped: EngineStopped | None = None
        self._failed = asyncio.Event()
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
            self._end(EngineStopped("the engine is closed"))

    @property
    def max_model_len(self) -> int:
        return self._core.max_model_len

    @property
    def vocab_size(self) -> int:
        return self._core.vocab_size

    async def wait_failed(self) -> None:
        """Returns when the engine thread has died, and every request has been told."""
        await self._failed.wait()

    def submit(self, request: EngineRequest, *, listener: Listener | None = None) -> None:
        """Takes a request in; its events go to the listener, or come from stream().

        Raises InvalidRequest for what could never be served, QueueFull when the engine holds max_num_requests, EngineStopped.
        """
        self._take_in(request, Purpose.GENERATE, listener)

    async def stream(self, request_id: str) -> AsyncGenerator[TokenEvent, None]:
        """The events of a request without listener until all its choices have ended; to be read once. Leaving early aborts the request.

        Raises UnknownRequest, and EngineStopped when the engine ends first.
        """
        opened = self._delivery.get(request_id)
        if opened is None or opened.stream is None:
            raise self._stopped or UnknownRequest(f"no request {request_id!r} is to be read here")
        num_open = opened.request.sampling.n
        try:
            while num_open:
                event = await opened.stream.next()
                assert isinstance(event, TokenEvent)
                num_open -= event.finish_reason is not None
                yield event
        finally:
            self._close(opened)

    @contextlib.asynccontextmanager
    async def prefill(self, request: EngineRequest) -> AsyncIterator[AsyncIterator[PrefillProgress]]:
        """Computes a prompt and samples the first token of every choice, for another engine to go on from; begins when it is entered.

        Gives an event for what was cached, then one for each step that computed a part; the last one has the first tokens. The blocks
        stay owned until the context is left: stay in it until they have been copied. Leaving early aborts.
        Entering raises what submit() does, the events EngineStopped. They end without first tokens when it is aborted from elsewhere.
        """
        opened = self._take_in(request, Purpose.PREFILL, None)
        assert opened.stream is not None
        try:
            async with contextlib.aclosing(_progress(opened.stream)) as steps:
                yield steps
        finally:
            self._close(opened)

    def reserve(self, request: EngineRequest, *, listener: Listener) -> None:
        """Takes in a request whose prompt somebody else will compute. It waits like any other; the listener hears Reserved when it has its
        place and its blocks. Then comes one of landed, compute_here, quarantine and abort. Until then it keeps others from both.

        Raises what submit() does.
        """
        self._take_in(request, Purpose.RECEIVE, listener, hand_over=self._admit)

    def landed(self, request_id: str, first_tokens: Sequence[SampledToken]) -> None:
        """Keys and values of the whole prompt are in the reserved blocks; goes on after the given first token of each choice.

        Raises InvalidRequest, and changes nothing, unless there is one possible token for each choice. Unknown ids are ignored.
        """
        if opened := self._delivery.get(request_id):
            self._core.validate_first_tokens(opened.request, first_tokens)
            reserved = self._take_reserved(opened)
            tokens = tuple(first_tokens)
            # The client's first token: told before the engine thread, which may be in a step, has heard of it.
            events = self._core.first_events(opened.request, tokens, cached_tokens=reserved.num_cached_tokens)
            self._loop.call_soon(self._delivery.deliver, events)
            self._leaving.add(request_id)  # a first token may be the last one
            # After what the listener does with it: the next step would compete with that for the interpreter.
            self._loop.call_soon(self._loop.call_soon, self._go_on, opened, tokens)

    def _go_on(self, opened: OpenRequest, first_tokens: tuple[SampledToken, ...]) -> None:
        if opened.is_aborted:
            return
        request_id = opened.request.request_id

        def go_on() -> None:
            self._core.landed(request_id, first_tokens)
            self._leaving.discard(request_id)

        self._inbox.put(go_on)

    def compute_here(self, request_id: str, *, num_landed_tokens: int = 0) -> None:
        """Computes a reserved prompt here after all, from the last block that has landed whole. Nobody may write there any more.

        num_landed_tokens   from the start of the prompt, cached ones included
        Unknown ids are ignored.
        """
        if opened := self._delivery.get(request_id):
            self._take_reserved(opened)
            self._inbox.put(lambda: self._core.compute_here(request_id, num_landed_tokens))

    def quarantine(self, request_id: str, *, abort: bool = False) -> tuple[int, ...]:
        """Gives up a reserved request's blocks while a peer may still write into them; returns those, to be lifted when it cannot.

        The request waits again, at its old place, to be computed here; with `abort` it ends as by abort(). Unknown ids: no blocks.
        """
        opened = self._delivery.get(request_id)
        if opened is None:
            return ()
        reserved = self._take_reserved(opened)
        first_block = reserved.num_cached_tokens // self._core.block_size
        places = self._core.groups.places(opened.request.num_tokens)
        block_ids = tuple(block_id for block_id, place in zip(reserved.block_ids, places, strict=True) if place.block >= first_block)
        self._quarantined.update(block_ids)
        self._inbox.put(lambda: self._core.quarantine(request_id))
        if abort:
            self._close(opened)
        return block_ids

    def lift_quarantine(self, block_ids: Sequence[int]) -> None:
        """Nobody writes into these blocks any more."""
        lifted = frozenset(block_ids)
        assert lifted <= self._quarantined
        self._quarantined -= lifted
        self._inbox.put(lambda: self._core.lift_quarantine(tuple(lifted)))

    def abort(self, request_id: str) -> None:
        """Ends a request: nothing more is heard of it but an ABORT for each open choice, and its blocks are free after the running step.

        Until then the id stays in use. Unknown ids are ignored. For a reserved one only when no peer writes any more; else quarantine().
        """
        if opened := self._delivery.get(request_id):
            self._close(opened)

    def stats(self) -> EngineStats:
        """A snapshot; while a step runs some of its counters may be one step apart."""
        return self._core.stats()

    def _take_in(
        self,
        request: EngineRequest,
        purpose: Purpose,
        listener: Listener | None,
        *,
        hand_over: Callable[[Command], object] | None = None,
    ) -> OpenRequest:
        if self._stopped:
            raise self._stopped
        self._core.validate(request, purpose)
        if self._delivery.get(request.request_id) or request.request_id in self._leaving:
            raise InvalidRequest("request_id", f"{request.request_id!r} is in use")
        if len(self._delivery) >= self._max_num_requests:
            raise QueueFull(f"{len(self._delivery)} requests are running or waiting, which is the limit")
        opened = self._delivery.open(request, listener)
        arrived_at = self._core.now()
        (hand_over or self._inbox.put)(lambda: self._core.add(request, purpose, arrived_at=arrived_at))
        return opened

    def _admit(self, add: Command) -> None:
        """Has a request added that is not computed here; if the engine thread is asleep, on the loop, which saves two wake-ups.

        It may overtake the one command that the thread is just waking up for.
        """
        if not (self._inbox.empty() and self._at_work.acquire(blocking=False)):
            self._inbox.put(add)
            return
        try:
            add()
            events = self._core.admit()
            self._loop.call_soon(self._deliver, events, *self._core.pool.drain_changes())
        except Exception:
            _log.exception("the engine failed")
            self._loop.call_soon(self._fail)
        finally:
            self._at_work.release()

    def _take_reserved(self, opened: OpenRequest) -> Reserved:
        """What was reserved for a request; it is answered for only once."""
        reserved, opened.reserved = opened.reserved, None
        assert reserved is not None, f"{opened.request.request_id!r} is not reserved"
        return reserved

    def _close(self, opened: OpenRequest) -> None:
        """Ends a request of which the core may still know; what was made for it meanwhile is not delivered."""
        if not self._delivery.close(opened) or not opened.open_choices:
            return
        opened.is_aborted = True
        request_id = opened.request.request_id
        self._loop.call_soon(opened.listener, abort_events(opened))
        self._leaving.add(request_id)

        def drop() -> None:
            self._core.abort(request_id)
            self._loop.call_soon_threadsafe(self._leaving.discard, request_id)

        self._inbox.put(drop)

    def _run(self) -> None:
        """The engine thread: commands between steps, steps while there is something to do. It has the core but while it sleeps."""
        try:
            with self._at_work:
                while self._obey(wait=not self._core.has_work):
                    if self._core.has_work:
                        self._post(self._core.step(announce=self._post))
        except Exception:
            # Whatever broke, no request may hang: they all learn that the engine is gone, and the details stay in the log.
            _log.exception("the engine thread died")
            self._loop.call_soon_threadsafe(self._fail)

    def _obey(self, *, wait: bool) -> bool:
        """Carries out all commands that have come in, waiting for one if there is nothing else to do. False: stop."""
        goes_on = True
        while goes_on:
            try:
                command = self._sleep() if wait else self._inbox.get_nowait()
            except queue.Empty:
                break
            if command is None:
                goes_on = False
            else:
                command()
            wait = False
        self._post(())
        return goes_on

    def _sleep(self) -> Command | None:
        """The next command, where there is nothing to do before it."""
        self._at_work.release()
        try:
            return self._inbox.get()
        finally:
            self._at_work.acquire()

    def _post(self, events: Sequence[Event]) -> None:
        """Hands events and changes of the prefix cache to the loop, if there are any."""
        stored, removed = self._core.pool.drain_changes()
        if events or stored or removed:
            self._loop.call_soon_threadsafe(self._deliver, events, stored, removed)

    def _deliver(self, events: Sequence[Event], stored: list[bytes], removed: list[bytes]) -> None:
        self._delivery.deliver(events)
        if self._on_blocks and (stored or removed):
            self._on_blocks(stored, removed)

    def _fail(self) -> None:
        self._end(EngineStopped("the engine failed"))
        self._failed.set()

    def _end(self, reason: EngineStopped) -> None:
        self._stopped = self._stopped or reason
        self._delivery.end(self._stopped)


async def _progress(events: EventStream) -> AsyncGenerator[PrefillProgress, None]:
    """A prefill's events up to its first tokens, or to its end without them."""
    while isinstance(event := await events.next(), PrefillProgress):
        yield event
        if event.first_tokens is not None:
            return
