"""Reading a stream while watching the clock: silence is a fact of its own, a heartbeat to send or a death to notice."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeVar

_Item = TypeVar("_Item")

# Every long stream of the mesh says something at least this often …
HEARTBEAT_S = 0.5
# … and a peer that has said nothing for this long counts as frozen.
SILENCE_S = 3.0


class Listening:
    """Notices when a peer has said nothing for SILENCE_S. Whoever reads the stream calls heard() for everything that comes.

    Counts its own ticks instead of looking at a clock: a process that was itself stopped for a while then blames nobody else for it.
    """

    def __init__(self) -> None:
        self._silent_ticks = 0

    def heard(self) -> None:
        self._silent_ticks = 0

    async def wait_silence(self, on_tick: Callable[[], object] | None = None) -> None:
        """Returns when the peer counts as frozen; calls `on_tick` each HEARTBEAT_S until then."""
        while self._silent_ticks * HEARTBEAT_S < SILENCE_S:
            await asyncio.sleep(HEARTBEAT_S)
            self._silent_ticks += 1
            if on_tick is not None:
                on_tick()


async def with_heartbeats(items: AsyncIterator[_Item], interval_s: float = HEARTBEAT_S) -> AsyncGenerator[_Item | None, None]:
    """The items as they come, and None each time `interval_s` has passed without one.

    Unlike a timeout around anext(), the wait for the next item is never cancelled but at the end, so that none is lost. The caller
    still owns `items` and closes it. Each step of `items` runs in a task of its own: no timeout and no task group may span its yields.
    """
    pending: asyncio.Future[_Item] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(items))
            done, _ = await asyncio.wait((pending,), timeout=interval_s)
            if not done:
                yield None
                continue
            finished, pending = pending, None
            try:
                item = finished.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.wait((pending,))
            if not pending.cancelled():
                pending.exception()  # whoever leaves early does not want it, and the loop would report that nobody looked
