"""Replicas' feeds: each gets a snapshot of every worker, then what changes. A reader that is too slow is cut off, never waited for."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator

from protos.baton.v1 import kv_index_pb2
from services.core.errors import BatonError, ResourceExhausted
from services.kv_index.state import IndexState
from services.mesh.streams import HEARTBEAT_S

RESPONSE_BYTES = 1 << 18
_EVENT_BYTES = 64  # of an event without its hashes


class Watcher:
    """One feed. `offer_nowait` is given every event; `responses` is what the stream sends."""

    def __init__(self, state: IndexState, *, buffer_bytes: int) -> None:
        self._state = state
        self._buffer_bytes = buffer_bytes
        self._events: deque[kv_index_pb2.BlockEvent] = deque()
        self._num_bytes = 0
        self._told: set[str] | None = set()  # workers whose snapshot is on its way; None: all
        self._news = asyncio.Event()
        self._end: BatonError | None = None

    def offer_nowait(self, event: kv_index_pb2.BlockEvent) -> None:
        """Queues an event, or cuts the feed off when it is too far behind."""
        if self._told is not None and event.worker.worker_id not in self._told:
            return  # its snapshot will contain it
        self._events.append(event)
        self._num_bytes += _size(event)
        self._news.set()
        if self._num_bytes > self._buffer_bytes:
            self.end(ResourceExhausted(f"this watcher is more than {self._buffer_bytes} bytes behind", retry_after_s=0.1))

    def end(self, error: BatonError) -> None:
        """The stream ends with `error` as soon as it wants to send again."""
        self._end = self._end or error
        self._events.clear()
        self._num_bytes = 0
        self._news.set()

    async def responses(self) -> AsyncGenerator[kv_index_pb2.WatchResponse, None]:
        """Snapshots, `synchronized`, then events or an empty heartbeat; without end. Raises the error it was ended with."""
        for response in self._snapshots():
            yield response
            self._raise_if_ended()
        yield kv_index_pb2.WatchResponse(synchronized=True)
        while True:
            try:
                # Less than the promised interval, for the time that the response needs.
                async with asyncio.timeout(HEARTBEAT_S * 0.8):
                    await self._news.wait()
            except TimeoutError:
                yield kv_index_pb2.WatchResponse()
                continue
            self._raise_if_ended()
            yield self._queued()

    def _raise_if_ended(self) -> None:
        if self._end is not None:
            raise self._end

    def _snapshots(self) -> Iterator[kv_index_pb2.WatchResponse]:
        assert self._told is not None
        response, num_bytes = kv_index_pb2.WatchResponse(), 0
        while True:
            untold = [each for each in self._state.index.worker_ids if each is not None and each not in self._told]
            for worker_id in untold:
                if worker_id not in self._state.index:
                    continue  # it left while others were told
                # From here on its events are queued, and go out after the last part of the snapshot.
                self._told.add(worker_id)
                for event in self._state.snapshot(worker_id):
                    if num_bytes > RESPONSE_BYTES:
                        yield response
                        response, num_bytes = kv_index_pb2.WatchResponse(), 0
                    response.events.append(event)
                    num_bytes += _size(event)
                if self._events:
                    yield response
                    response, num_bytes = kv_index_pb2.WatchResponse(), 0
                    while self._events:
                        yield self._queued()
            if response.events:
                yield response
                response, num_bytes = kv_index_pb2.WatchResponse(), 0
            elif not untold:
                # Nothing was sent since the last look, so nobody has come whom this feed would never hear of.
                self._told = None
                return

    def _queued(self) -> kv_index_pb2.WatchResponse:
        response, num_bytes = kv_index_pb2.WatchResponse(), 0
        while self._events and num_bytes < RESPONSE_BYTES:
            event = self._events.popleft()
            response.events.append(event)
            num_bytes += _size(event)
        self._num_bytes -= num_bytes
        if not self._events and self._end is None:
            self._news.clear()
        return response


class Watchers:
    """All feeds."""

    def __init__(self, *, buffer_bytes: int) -> None:
        self._buffer_bytes = buffer_bytes
        self._watchers: set[Watcher] = set()

    def add(self, state: IndexState) -> Watcher:
        watcher = Watcher(state, buffer_bytes=self._buffer_bytes)
        self._watchers.add(watcher)
        return watcher

    def remove(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)

    def broadcast(self, event: kv_index_pb2.BlockEvent) -> None:
        for watcher in self._watchers:
            watcher.offer_nowait(event)

    def end_all(self, error: BatonError) -> None:
        for watcher in self._watchers:
            watcher.end(error)


def _size(event: kv_index_pb2.BlockEvent) -> int:
    return _EVENT_BYTES + len(event.stored) + len(event.removed)
