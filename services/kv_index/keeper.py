"""The index of one instance: what it believes, who listens, and its copy in Redis.

    standing by ──▶ serving   when nobody owns the index in Redis (takes it and loads what Redis has), or when Redis cannot be reached
    serving ──▶ standing by   when another instance turns out to own it: all streams end, and their callers find the other

Serving is attached (a change goes to Redis, and is acknowledged when it is there) or detached (Redis is away: acknowledged when applied).

Knows nothing of gRPC. One event loop calls it.
"""

import asyncio
import logging

from protos.baton.v1 import kv_index_pb2
from services.core.errors import InvalidRequest, PeerUnavailable, Unavailable
from services.core.prefix_index import PrefixIndex
from services.kv_index.journal import Journal
from services.kv_index.redis_copy import Outcome, RedisCopy
from services.kv_index.session import PublishSession
from services.kv_index.state import IndexState, Verdict
from services.kv_index.watchers import Watcher, Watchers
from services.mesh import failpoints
from services.mesh.block_events import BlockChange, change_from_proto

# A standby takes over at most OWNER_LEASE_S + POLL_S after the owner's last renewal.
OWNER_LEASE_S = 0.8
_RENEWAL_S = 0.2
_POLL_S = 0.1
_RETRY_S = 0.25
_LEASE_TICKS = 20
_MAX_WRITE_HASHES = 1 << 16
# A round trip costs several times what a worker's part of it does, and nobody waits for Redis but acknowledgements.
_GATHER_S = 0.02

_log = logging.getLogger(__name__)


class _TakenByAnother(Exception):
    """The index in Redis is another instance's now."""


class Keeper:
    """`run` keeps the roles; the other methods are what streams do, and raise Unavailable while standing by."""

    def __init__(self, *, lease_s: float, watch_buffer_bytes: int) -> None:
        self._tick_s = lease_s / _LEASE_TICKS
        self._state = IndexState(lease_ticks=_LEASE_TICKS)
        self._journal = Journal()
        self._watchers = Watchers(buffer_bytes=watch_buffer_bytes)
        self._sessions: dict[str, PublishSession] = {}
        self._trouble: str | None = None  # what the log was told last about Redis
        self._patient_until = 0.0
        self.serving = False

    @property
    def attached(self) -> bool:
        """Whether changes go to Redis."""
        return self._journal.attached

    @property
    def index(self) -> PrefixIndex:
        self.require_serving()
        return self._state.index

    def require_serving(self) -> None:
        if not self.serving:
            raise Unavailable("another instance owns the index, or this one has only just started", retry_after_s=_POLL_S)

    def watch(self) -> Watcher:
        """A new feed; end it with unwatch()."""
        self.require_serving()
        return self._watchers.add(self._state)

    def unwatch(self, watcher: Watcher) -> None:
        self._watchers.remove(watcher)

    def publish(self, session: PublishSession, event: kv_index_pb2.BlockEvent) -> None:
        """Takes one event of a stream. Raises InvalidRequest when it is malformed or of an earlier start of its worker."""
        self.require_serving()
        failpoints.hit("kv_index.publish")
        change = change_from_proto(event)
        if session.identify(change):
            self._enter(session, change)
        verdict = self._state.offer(change)
        if verdict is Verdict.STALE:
            raise InvalidRequest("event.worker.epoch", f"{change.epoch} is not the latest start of {change.worker_id}")
        if verdict is Verdict.APPLIED:
            self._applied(session, change, event)
        elif verdict is Verdict.REPEATED:
            self._repeated(session, change)
        if verdict is Verdict.GAP or self._journal.needs_snapshot(change.worker_id):
            session.want_snapshot()

    def leave(self, session: PublishSession) -> None:
        """The stream has ended; the worker's entries live on until its lease runs out."""
        worker_id = session.worker_id
        if worker_id is not None and self._sessions.get(worker_id) is session:
            del self._sessions[worker_id]

    async def run(self, redis: RedisCopy | None) -> None:
        """Keeps the roles and the copy in Redis, if there is one, until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep())
            if redis is None:
                self.serving = True
            else:
                group.create_task(self._follow(redis))

    def _enter(self, session: PublishSession, change: BlockChange) -> None:
        position = self._state.index.position(change.worker_id)
        if position is not None and change.epoch < position[0]:
            return  # an earlier start must not end the stream of the later one
        before = self._sessions.get(change.worker_id)
        if before is not None:
            before.end(Unavailable("this worker has opened another stream"))
        self._sessions[change.worker_id] = session

    def _applied(self, session: PublishSession, change: BlockChange, event: kv_index_pb2.BlockEvent) -> None:
        if change.snapshot:
            session.snapshot_came()
        self._watchers.broadcast(event)
        self._journal.add(change)
        if not self.attached or change.gone:
            session.acknowledge(change.epoch, change.sequence_number)

    def _repeated(self, session: PublishSession, change: BlockChange) -> None:
        position = self._state.index.position(change.worker_id)
        assert position is not None
        self._journal.renew(change.worker_id, epoch=position[0], sequence_number=position[1])
        if self.attached:
            session.answer()
        else:
            session.acknowledge(*position)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            for event in self._state.tick():
                _log.info("worker %s is silent: forgotten", event.worker.worker_id)
                self._watchers.broadcast(event)
                self._journal.forget(event.worker.worker_id, epoch=event.worker.epoch)

    async def _follow(self, redis: RedisCopy) -> None:
        while True:
            try:
                await self._own_and_write(redis)
            except* _TakenByAnother:
                self._stand_by()
            except* PeerUnavailable as group:
                self._detach(group)
            await asyncio.sleep(_RETRY_S)

    async def _own_and_write(self, redis: RedisCopy) -> None:
        """Waits for the index to be ours, then keeps it in Redis; ends only by an error."""
        await self._wait_until_ours(redis)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew_forever(redis))
            if not self.serving:
                self._state = IndexState(lease_ticks=_LEASE_TICKS)  # an earlier try may have loaded a part
            await self._load(redis)
            self._journal.attach()
            self.serving = True
            self._trouble = None
            _log.info("serving, with Redis: %d entries", self._state.index.num_entries)
            while True:
                await self._write(redis)

    async def _wait_until_ours(self, redis: RedisCopy) -> None:
        clock = asyncio.get_running_loop().time
        # A Redis that lost its data lost the owner's lease with them: who serves workers may take it back at once, others only after the
        # time in which it would have lapsed.
        while not (ownership := await redis.own(may_take=bool(self._sessions) or clock() >= self._patient_until)).ours:
            if ownership.lapses_in_s is not None:
                self._patient_until = clock() + ownership.lapses_in_s
                self._stand_by()
            await asyncio.sleep(_POLL_S)

    async def _renew_forever(self, redis: RedisCopy) -> None:
        while True:
            await asyncio.sleep(_RENEWAL_S)
            await self._renew(redis)

    async def _renew(self, redis: RedisCopy) -> None:
        if not (await redis.own(may_take=True)).ours:
            raise _TakenByAnother

    async def _load(self, redis: RedisCopy) -> None:
        """Takes over what Redis has and we do not."""
        async for worker in redis.load():
            if worker.worker_id not in self._state.index:
                self._state.load(worker.worker_id, epoch=worker.epoch, sequence_number=worker.sequence_number, hashes=worker.hashes)
                for event in self._state.snapshot(worker.worker_id):
                    self._watchers.broadcast(event)
            await asyncio.sleep(0)

    async def _write(self, redis: RedisCopy) -> None:
        await self._journal.wait_pending()
        await asyncio.sleep(_GATHER_S)
        batches = self._journal.take_nowait(_MAX_WRITE_HASHES)
        outcomes = await redis.write(batches)
        for batch, outcome in zip(batches, outcomes, strict=True):
            session = self._sessions.get(batch.worker_id)
            if outcome is not Outcome.WRITTEN:
                self._journal.refuse(batch)
            if session is not None and outcome is Outcome.WRITTEN:
                session.acknowledge(batch.epoch, batch.sequence_number)
            elif session is not None and self._journal.needs_snapshot(batch.worker_id):
                session.want_snapshot()
        if Outcome.NOT_OWNER in outcomes:
            await self._renew(redis)

    def _detach(self, group: BaseExceptionGroup[PeerUnavailable]) -> None:
        """Redis is away: goes on from memory alone."""
        trouble = str(group.exceptions[0])
        if trouble != self._trouble:
            _log.warning("serving from memory alone: %s", trouble)
            self._trouble = trouble
        self._journal.detach()
        self.serving = True
        if not self._sessions:
            self._patient_until = asyncio.get_running_loop().time() + OWNER_LEASE_S
        for worker_id, session in self._sessions.items():
            position = self._state.index.position(worker_id)
            if position is not None:
                session.acknowledge(*position)

    def _stand_by(self) -> None:
        if not self.serving:
            return
        _log.warning("another instance owns the index: standing by")
        self.serving = False
        error = Unavailable("another instance owns the index", retry_after_s=_POLL_S)
        for session in self._sessions.values():
            session.end(error)
        self._sessions.clear()
        self._watchers.end_all(error)
        self._journal = Journal()
        self._state = IndexState(lease_ticks=_LEASE_TICKS)
