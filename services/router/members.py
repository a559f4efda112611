"""The workers that this router talks to: found by discovery, held by a session or a load stream, and told of to the fleet.

The first decode worker that answers decides which model and KV layout this router serves; others with another one are shown and not used.
When its last worker has gone, the next one decides anew. Knows nothing of requests.
"""

import asyncio
import gc
import logging
import time
from dataclasses import dataclass

import grpc

from protos.baton.v1 import common_pb2, decode_pb2, prefill_pb2, prefill_pb2_grpc, status_pb2
from services.core.errors import BatonError, Incompatible, PeerUnavailable
from services.mesh import convert, status
from services.mesh.block_events import MAX_WORKER_ID_CHARACTERS
from services.mesh.client import open_channel
from services.mesh.discovery import Discovery, WorkerRecord
from services.mesh.index_client import IndexReplica
from services.mesh.streams import SILENCE_S, with_heartbeats
from services.router.cost_model import CostModel
from services.router.decode_session import RECONNECT_S, DecodeSession
from services.router.fleet import Fleet, Role

CALLS_END_S = 1.0  # in which the library lets go of what was under way in a cancelled call

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """One worker record, and what its stream has told."""

    record: WorkerRecord
    task: asyncio.Task[None]
    session: DecodeSession | None = None
    worker: common_pb2.WorkerId | None = None  # None while it is not connected
    identity: common_pb2.ModelIdentity | None = None
    load: common_pb2.WorkerLoad | None = None
    reported_at: float = 0.0
    difference: str | None = None  # in what it is unlike what this router serves


class Members:
    """run() keeps the streams; everything else reads."""

    def __init__(self, discovery: Discovery, replica: IndexReplica, *, router_id: str, served_model_name: str | None) -> None:
        self._discovery = discovery
        self._replica = replica
        self._router_id = router_id
        self._served_model_name = served_model_name
        self._members: dict[str, Member] = {}  # by worker_id of its record
        self._tasks: asyncio.TaskGroup | None = None
        self.fleet: Fleet | None = None
        self.identity: common_pb2.ModelIdentity | None = None

    @property
    def model_name(self) -> str:
        return self._served_model_name or (self.identity.model_name if self.identity is not None else "")

    def require_identity(self) -> common_pb2.ModelIdentity:
        """What is served. Raises PeerUnavailable while there is no worker to tell."""
        if self.identity is None:
            raise PeerUnavailable("no decode worker has answered yet", retry_after_s=1.0)
        return self.identity

    def require_fleet(self) -> Fleet:
        """Raises PeerUnavailable while there is no worker."""
        if self.fleet is None:
            raise PeerUnavailable("no decode worker has answered yet", retry_after_s=1.0)
        return self.fleet

    def can_serve(self) -> bool:
        """Whether there is a decode worker that takes requests."""
        now = time.monotonic()
        return any(member.session is not None and _state(member, now) == "up" for member in self._members.values())

    def session(self, worker_id: str) -> DecodeSession:
        """The session with a decode worker. Raises PeerUnavailable when there is none."""
        member = self._by_worker_id(worker_id)
        if member is None or member.session is None or not member.session.is_up:
            raise PeerUnavailable(f"there is no session with {worker_id}")
        return member.session

    def address(self, worker_id: str) -> str | None:
        """Where a worker is; None when it has left a moment ago."""
        member = self._by_worker_id(worker_id)
        return None if member is None else member.record.address

    async def run(self) -> None:
        """Follows discovery until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            async for records in self._discovery.watch():
                self._follow({record.worker_id: record for record in records if record.role in ("prefill", "decode")})

    def status(self) -> status_pb2.WatchStatusResponse:
        """Everybody as this router sees them; the counters are the caller's to add."""
        now = time.monotonic()
        in_fleet = {} if self.fleet is None else {worker.worker_id: worker for worker in self.fleet.workers(now)}
        message = status_pb2.WatchStatusResponse(router_id=self._router_id, model_name=self.model_name)
        message.index_synchronized = self._replica.synchronized
        message.index_entries = self._replica.index.num_entries
        for member in sorted(self._members.values(), key=lambda member: (member.record.role, member.record.worker_id)):
            worker_id = member.worker.worker_id if member.worker is not None else member.record.worker_id
            known = in_fleet.get(worker_id)
            message.workers.append(
                status_pb2.WorkerStatus(
                    worker=member.worker or common_pb2.WorkerId(worker_id=worker_id, epoch=member.record.epoch),
                    role=member.record.role,
                    address=member.record.address,
                    state=_state(member, now),
                    report_age_s=now - member.reported_at if member.load is not None else 0.0,
                    in_flight=0 if known is None else known.own_requests if known.role is Role.DECODE else known.own_prefills,
                    load=member.load,
                )
            )
        return message

    def _by_worker_id(self, worker_id: str) -> Member | None:
        member = self._members.get(worker_id)
        if member is not None:
            return member
        # A setting may list a worker without its name.
        return next((other for other in self._members.values() if other.worker is not None and other.worker.worker_id == worker_id), None)

    def _follow(self, records: dict[str, WorkerRecord]) -> None:
        assert self._tasks is not None
        for worker_id, member in list(self._members.items()):
            if records.get(worker_id) != member.record:
                self._disconnected(member)
                del self._members[worker_id]
                self._tasks.create_task(_part(member))
        for worker_id, record in records.items():
            if worker_id not in self._members:
                self._members[worker_id] = self._meet(record, self._tasks)

    def _meet(self, record: WorkerRecord, tasks: asyncio.TaskGroup) -> Member:
        if record.role == "prefill":
            member = Member(record=record, task=tasks.create_task(asyncio.sleep(0)))
            member.task = tasks.create_task(self._watch_prefill(member))
            return member

        def on_welcome(welcome: decode_pb2.SessionWelcome) -> None:
            self._connected(member, welcome.worker, welcome.model)

        session = DecodeSession(
            record.address,
            router_id=self._router_id,
            on_welcome=on_welcome,
            on_load=lambda load: self._reported(member, load),
            on_lost=lambda: self._disconnected(member),
        )
        member = Member(record=record, task=tasks.create_task(session.run()), session=session)
        return member

    async def _watch_prefill(self, member: Member) -> None:
        """Holds a load stream with a prefill worker, and again when it breaks."""
        address = member.record.address
        async with open_channel(address) as channel:
            stub = prefill_pb2_grpc.PrefillServiceStub(channel)
            said = ""
            while True:
                call = stub.WatchLoad(prefill_pb2.WatchLoadRequest(router_id=self._router_id))
                error: BatonError = PeerUnavailable(f"{address} ended its load stream")
                try:
                    async for response in with_heartbeats(aiter(call), SILENCE_S):
                        if response is None:
                            error = PeerUnavailable(f"{address} has said nothing for {SILENCE_S} s")
                            break
                        if response.HasField("worker"):
                            self._connected(member, response.worker, response.model)
                        self._reported(member, response.load)
                except grpc.aio.AioRpcError as rpc_error:
                    error = status.from_rpc_error(rpc_error, address)
                except BatonError as failure:
                    error = failure
                except Exception:
                    # Whatever a worker sends, it costs its own stream and not the router.
                    _log.exception("the load stream of %s failed", address)
                    error = PeerUnavailable(f"the load stream of {address} failed")
                finally:
                    call.cancel()
                    was_up = member.worker is not None
                    self._disconnected(member)
                if was_up or error.message != said:  # not once more for each try
                    _log.warning("no load stream of %s: %s", address, error.message)
                    said = error.message
                await asyncio.sleep(RECONNECT_S)

    def _connected(self, member: Member, worker: common_pb2.WorkerId, identity: common_pb2.ModelIdentity) -> None:
        """Raises Incompatible or InvalidRequest, and changes nothing, for a worker that cannot be what it says."""
        if member.worker is not None:
            raise Incompatible(f"{member.record.address} has said already who it is")
        if any(other.worker is not None and other.worker.worker_id == worker.worker_id for other in self._members.values()):
            raise Incompatible(f"{member.record.address} calls itself {worker.worker_id[:64]!r}, as another worker does")
        _check_identity(worker, identity)
        if self.fleet is None or not self._serves_anybody():
            if member.record.role != "decode":
                # Which model is served is the decode workers' to say; this one is met again when one has.
                member.worker, member.identity = worker, identity
                return
            self._adopt(identity)
        member.worker, member.identity = worker, identity
        self._join(member)

    def _serves_anybody(self) -> bool:
        return any(
            member.worker is not None and member.difference is None and member.record.role == "decode" for member in self._members.values()
        )

    def _adopt(self, identity: common_pb2.ModelIdentity) -> None:
        """Serves this model from now on. The fleet's learnt costs go on when it is the same one."""
        if self.identity is None or convert.first_difference(self.identity, identity) is not None:
            _log.info("serving %s, blocks of %d tokens", identity.model_name, identity.block_size)
            self.identity = identity
            self.fleet = Fleet(
                layout_fingerprint=identity.layout_fingerprint,
                block_size=identity.block_size,
                model=CostModel.learnt(block_bytes=identity.block_bytes),
            )
        # Those that were met while there was nobody to say what is served.
        for member in self._members.values():
            if member.worker is not None:
                self._join(member)

    def _join(self, member: Member) -> None:
        assert self.fleet is not None
        assert self.identity is not None
        assert member.worker is not None
        assert member.identity is not None
        member.difference = convert.first_difference(self.identity, member.identity)
        if member.difference is not None:
            _log.warning("%s is not used: its %s differs", member.worker.worker_id, member.difference)
        role = Role.DECODE if member.record.role == "decode" else Role.PREFILL
        self.fleet.join(
            member.worker.worker_id, role=role, epoch=member.worker.epoch, layout_fingerprint=member.identity.layout_fingerprint
        )
        if member.load is not None:
            self.fleet.report(member.worker.worker_id, member.load, time.monotonic())

    def _reported(self, member: Member, load: common_pb2.WorkerLoad) -> None:
        member.load, member.reported_at = load, time.monotonic()
        if self.fleet is not None and member.worker is not None:
            self.fleet.report(member.worker.worker_id, load, member.reported_at)

    def _disconnected(self, member: Member) -> None:
        if member.worker is not None and self.fleet is not None:
            self.fleet.leave(member.worker.worker_id)
        member.worker = member.load = None


def _check_identity(worker: common_pb2.WorkerId, identity: common_pb2.ModelIdentity) -> None:
    """Raises Incompatible or InvalidRequest for what nobody could be served from: the first worker's word is every request's limits."""
    if not 0 < len(worker.worker_id) <= MAX_WORKER_ID_CHARACTERS:
        raise Incompatible(f"a worker's name has {len(worker.worker_id)} characters, not 1 … {MAX_WORKER_ID_CHARACTERS}")
    for name, least in (("block_size", 1), ("block_bytes", 1), ("max_model_len", 2), ("vocab_size", 1)):
        if getattr(identity, name) < least:
            raise Incompatible(f"{worker.worker_id} has a {name} of {getattr(identity, name)}")
    convert.sampling_from_proto(common_pb2.SamplingParams(), identity.defaults).validate(vocab_size=identity.vocab_size)


async def _part(member: Member) -> None:
    """Leaves a worker that is not announced any more: it may drain, so what runs there is followed to its end."""
    if member.session is not None:
        await member.session.wait_idle()
    task = member.task
    task.cancel()
    await asyncio.wait((task,))
    # A call that is cancelled while it connects holds itself, by grpc.aio's own tasks, and with it the connection, which would be made
    # again and again until the garbage collector comes by: hours, in a quiet router. It has little to look at: see process.py's freeze.
    del member, task
    await asyncio.sleep(CALLS_END_S)
    gc.collect()


def _state(member: Member, now: float) -> str:
    if member.worker is None:
        return "connecting"
    if member.difference is not None:
        return "incompatible"
    if member.load is None or now - member.reported_at > SILENCE_S:
        return "silent"
    return "draining" if member.load.draining else "up"
