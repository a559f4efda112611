"""The KV index as workers and routers use it: a publisher that tells what this worker holds, a replica that knows what all hold.

Both find the instance that owns the index among several addresses, come back after every loss, and never fail who uses them: without the
index requests are slower, not wrong (law 5).
"""

import asyncio
import gc
import itertools
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any

import grpc

from protos.baton.v1 import kv_index_pb2, kv_index_pb2_grpc
from services.core.errors import BatonError, PeerUnavailable
from services.core.prefix_index import PrefixIndex
from services.mesh import status
from services.mesh.block_events import change_from_proto
from services.mesh.client import open_channel
from services.mesh.index_outbox import IndexOutbox
from services.mesh.streams import SILENCE_S

HEARTBEAT_S = 1.0
_FAREWELL_S = 0.5
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.05, 0.25
_YIELD_AFTER_HASHES = 4096
_CALLS_END_S = 1.0  # in which the library lets go of what was under way in a cancelled call

_log = logging.getLogger(__name__)


class _Connection:
    """Keeps one long stream to whichever address takes it: the next address at once, a pause after each round of them all."""

    def __init__(self, what: str, addresses: Sequence[str], stream: Callable[[grpc.aio.Channel], Coroutine[Any, Any, None]]) -> None:
        assert addresses
        self._what = what
        self._addresses = addresses
        self._stream = stream
        self._fresh = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def wait(self, timeout_s: float) -> None:
        """Waits until the stream has ended for good, but no longer than that."""
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=timeout_s)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
            self._task = None

    def succeeded(self) -> None:
        """The stream at hand works: the next loss is a new one."""
        self._fresh = True

    async def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        said: dict[str, str] = {}  # the trouble with each address that the log has already
        for number, address in enumerate(itertools.cycle(self._addresses), 1):
            self._fresh = False
            try:
                async with open_channel(address) as channel:
                    await self._stream(channel)
                return
            except grpc.aio.AioRpcError as error:
                trouble = status.from_rpc_error(error, address).message
            except BatonError as error:
                trouble = error.message
            except Exception:
                # The index is optional: a bug here must not end a worker or a router.
                _log.exception("%s: unexpected error", self._what)
                trouble = "unexpected error"
            if self._fresh:
                backoff_s = _FIRST_BACKOFF_S
                said.clear()
            if said.get(address) != trouble:
                _log.info("%s: %s: %s", self._what, address, trouble)
                said[address] = trouble
            if self._fresh or number % len(self._addresses) == 0:
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                if self._fresh:
                    # A call whose read timed out is part of a circle of frames and errors, which keeps its connection until the collector
                    # comes by: hours, in a quiet process. Once for each loss, in processes that have frozen what they loaded.
                    asyncio.get_running_loop().call_later(_CALLS_END_S, gc.collect)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)


async def _next_response(call: Any) -> Any:
    """The next response of a stream. Raises PeerUnavailable when it has ended or none comes: frozen, or the network is gone."""
    try:
        async with asyncio.timeout(SILENCE_S):
            response = await call.read()
    except TimeoutError as error:
        raise PeerUnavailable(f"silent for {SILENCE_S} s") from error
    if response is grpc.aio.EOF:
        raise PeerUnavailable("the stream has ended")
    return response


class IndexPublisher:
    """Tells the index what this worker holds, while entered; leaving says that it is gone."""

    def __init__(self, addresses: Sequence[str], *, worker_id: str, epoch: int, heartbeat_s: float = HEARTBEAT_S) -> None:
        """`addresses` of all instances of the index service; with none nothing is told."""
        self._outbox = IndexOutbox(worker_id=worker_id, epoch=epoch)
        self._heartbeat_s = heartbeat_s
        self._news = asyncio.Event()  # for the writer
        self._answered = asyncio.Event()
        self._leaving = self._farewell_sent = False
        self._connection = _Connection("index publisher", addresses, self._publish) if addresses else None

    async def __aenter__(self) -> "IndexPublisher":
        if self._connection is not None:
            self._connection.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._connection is not None:
            self._leaving = True
            self._news.set()
            try:
                await self._connection.wait(_FAREWELL_S)
            finally:
                await self._connection.stop()

    @property
    def all_acknowledged(self) -> bool:
        """Whether the index has everything that was told so far."""
        return self._outbox.all_acknowledged

    async def wait_acknowledged(self) -> None:
        """Waits until the index has everything that was told so far; for ever while no index answers."""
        while not self._outbox.all_acknowledged:
            self._answered.clear()
            await self._answered.wait()

    def publish_nowait(self, *, stored: Iterable[bytes] = (), removed: Iterable[bytes] = ()) -> None:
        """What has changed: `removed` first, then `stored`. Never waits, never fails."""
        if self._connection is not None:
            self._outbox.change(stored=stored, removed=removed)
            self._news.set()

    async def _publish(self, channel: grpc.aio.Channel) -> None:
        """One stream; returns after a farewell, else raises what it ended with."""
        self._outbox.rewind()
        call = kv_index_pb2_grpc.KVIndexServiceStub(channel).Publish()
        reading = asyncio.ensure_future(self._read_answers(call))
        writing = asyncio.ensure_future(self._write_events(call))
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_EXCEPTION)
            if reading.done():
                reading.result()
            if writing.done():
                writing.result()
        finally:
            reading.cancel()
            writing.cancel()
            call.cancel()
            await asyncio.wait((reading, writing))
            # What is raised here holds this frame, and is held by its task: a circle, in which the call would keep its connection until
            # the garbage collector comes by.
            del reading, writing

    async def _read_answers(self, call: Any) -> None:
        assert self._connection is not None
        while not self._farewell_sent:
            response = await _next_response(call)
            self._connection.succeeded()
            self._outbox.acknowledge(response.sequence_number)
            if response.need_snapshot:
                self._outbox.need_snapshot()
            self._news.set()
            self._answered.set()

    async def _write_events(self, call: Any) -> None:
        silent = True  # nothing was sent for heartbeat_s, or on this stream at all: ask whether the index knows what it should
        try:
            while not self._leaving:
                self._news.clear()
                event = self._outbox.next_event() or (self._outbox.heartbeat() if silent else None)
                silent = False
                if event is not None:
                    await call.write(kv_index_pb2.PublishRequest(event=event))
                else:
                    silent = not await self._news_within(self._heartbeat_s)
            await call.write(kv_index_pb2.PublishRequest(event=self._outbox.farewell()))
            self._farewell_sent = True
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the stream has ended: the reader knows how

    async def _news_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return False
        return True


class IndexReplica:
    """What the index knows, in this process, while entered.

    `index` is one object from first to last, and keeps what it has while no service answers.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        """`addresses` of all instances of the index service; with none the replica stays empty."""
        self.index = PrefixIndex()
        self._synchronized = asyncio.Event()
        self.num_subscriptions = 0  # that got as far as synchronized
        self._heard_at: float | None = None
        self._connection = _Connection("index replica", addresses, self._watch) if addresses else None

    async def __aenter__(self) -> "IndexReplica":
        if self._connection is not None:
            self._connection.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._connection is not None:
            await self._connection.stop()

    @property
    def synchronized(self) -> bool:
        """Whether the present stream has told everything."""
        return self._synchronized.is_set()

    async def wait_synchronized(self) -> None:
        """Returns when a stream has told everything; never, while no index answers."""
        await self._synchronized.wait()

    @property
    def silence_s(self) -> float | None:
        """Time since the index was heard last; None: it never was."""
        return None if self._heard_at is None else time.monotonic() - self._heard_at

    async def _watch(self, channel: grpc.aio.Channel) -> None:
        """One stream; raises what it ended with."""
        assert self._connection is not None
        call = kv_index_pb2_grpc.KVIndexServiceStub(channel).Watch(kv_index_pb2.WatchRequest())
        told: set[str] = set()  # workers of which this stream has given a snapshot
        try:
            while True:
                response = await _next_response(call)
                self._heard_at = time.monotonic()
                self._connection.succeeded()
                await self._apply(response.events, told)
                if response.synchronized:
                    await self._forget_others(told)
                    self._synchronized.set()
                    self.num_subscriptions += 1
        finally:
            self._synchronized.clear()
            call.cancel()

    async def _apply(self, events: Iterable[kv_index_pb2.BlockEvent], told: set[str]) -> None:
        num_hashes = 0
        for change in map(change_from_proto, events):
            if change.gone:
                self.index.forget(change.worker_id)
            elif change.snapshot:
                told.add(change.worker_id)
                self.index.replace(change.worker_id, epoch=change.epoch, sequence_number=change.sequence_number, hashes=change.stored)
            elif not self.index.apply(
                change.worker_id,
                epoch=change.epoch,
                sequence_number=change.sequence_number,
                stored=change.stored,
                removed=change.removed,
            ):
                raise PeerUnavailable(f"an event of {change.worker_id} is missing before {change.sequence_number}")
            num_hashes += len(change.stored) + len(change.removed)
            if num_hashes > _YIELD_AFTER_HASHES:
                num_hashes = 0
                await asyncio.sleep(0)

    async def _forget_others(self, told: set[str]) -> None:
        for worker_id in list(self.index.worker_ids):
            if worker_id is not None and worker_id not in told:
                self.index.forget(worker_id)
                await asyncio.sleep(0)
