"""Who is there: workers announce themselves, routers watch. From a setting, or over leases in Redis.

A worker's announcement is a lease that it renews: it vanishes with the worker. When Redis is away, has lost its data or comes back with
old ones, the members known last stay until the leases that are renewed now can tell (law 5). Knows nothing of what workers do.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from services.core.errors import ConfigurationError, PeerUnavailable
from services.mesh.block_events import MAX_WORKER_ID_CHARACTERS
from services.mesh.client import is_address
from services.mesh.redis_store import RedisStore, Script, ScriptCall

LEASE_S = 3.0
RENEWAL_S = 1.0
POLL_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """One start of a worker: `epoch` grows with every start of the same worker_id; `address` is host:port of its gRPC server."""

    worker_id: str
    epoch: int
    role: str
    address: str


class Discovery(Protocol):
    """Where members come from."""

    def watch(self) -> AsyncIterator[frozenset[WorkerRecord]]:
        """All members, at once and again after each change; without end."""
        ...


ROLES = ("prefill", "decode")
MAX_EPOCH = 2**64 - 1  # what a message has room for


class StaticDiscovery:
    """Members that a setting names and that never change. Their epoch is 0: nobody knows it before the worker is asked."""

    def __init__(self, members: Sequence[WorkerRecord]) -> None:
        self._members = frozenset(members)

    @classmethod
    def parse(cls, entries: Sequence[str]) -> "StaticDiscovery":
        """From "role=host:port" or "role=worker_id@host:port" each; without a worker_id the address is it. Raises ConfigurationError."""
        members: list[WorkerRecord] = []
        problems: list[str] = []
        for entry in entries:
            role, _, place = entry.partition("=")
            worker_id, _, address = place.rpartition("@")
            if role not in ROLES:
                problems.append(f"workers: {entry!r} has a role that is not one of {', '.join(ROLES)}")
            elif (worker_id or address) in {member.worker_id for member in members}:
                problems.append(f"workers: {worker_id or address!r} is there twice")
            elif is_address(address):
                members.append(WorkerRecord(worker_id=worker_id or address, epoch=0, role=role, address=address))
            else:
                problems.append(f"workers: {entry!r} is not role=host:port or role=worker_id@host:port")
        if problems:
            raise ConfigurationError(problems)
        return cls(members)

    async def watch(self) -> AsyncIterator[frozenset[WorkerRecord]]:
        """The members, once; then waits until it is cancelled."""
        yield self._members
        await asyncio.Event().wait()


# One hash has all members: worker_id → "epoch deadline record", the epoch with 20 digits so that text compares like numbers, the
# deadline in Redis' own milliseconds. A later start of a worker takes the place of an earlier one, never the other way round.
_ANNOUNCE = Script("""
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local known = redis.call('HGET', KEYS[1], ARGV[1])
local deadline = known and string.match(known, '^%d+ (%d+) ')
if deadline and string.sub(known, 1, 20) > ARGV[2] and tonumber(deadline) > now then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%s %.0f %s', ARGV[2], now + ARGV[3], ARGV[4]))
return 1
""")
_WITHDRAW = Script("""
local known = redis.call('HGET', KEYS[1], ARGV[1])
if known and string.sub(known, 1, 20) == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
return 1
""")
# Returns who lives, after a mark that stays as long as Redis keeps its data. What is no announcement goes with those whose lease is over:
# it must not cost the mesh its members.
_LIST = Script("""
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('SETNX', KEYS[2], ARGV[1])
local answer = {redis.call('GET', KEYS[2])}
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local deadline, record = string.match(all[i + 1], '^%d+ (%d+) (.*)$')
  if deadline and tonumber(deadline) > now then answer[#answer + 1] = record else redis.call('HDEL', KEYS[1], all[i]) end
end
return answer
""")


def _keys(namespace: str) -> list[str]:
    return [f"baton:{{{namespace}}}:members", f"baton:{{{namespace}}}:members:mark"]


class Announcement:
    """Says that a worker is there, from entering until withdraw() or leaving. Without Redis it keeps trying and says so in the log."""

    def __init__(
        self, store: RedisStore, record: WorkerRecord, *, namespace: str = "default", lease_s: float = LEASE_S, renewal_s: float = RENEWAL_S
    ) -> None:
        self._store = store
        self._record = record
        self._lease_ms = int(lease_s * 1000)
        self._renewal_s = renewal_s
        self._key = _keys(namespace)[0]
        self._renewing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Announcement":
        """Returns without waiting for Redis."""
        self._renewing = asyncio.create_task(self._renew())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.withdraw()

    async def withdraw(self) -> None:
        """Takes the announcement back: a drain does it first of all. When Redis is away the lease runs out by itself. Idempotent."""
        renewing, self._renewing = self._renewing, None
        if renewing is None:
            return
        renewing.cancel()
        await asyncio.wait((renewing,))
        try:
            await self._store.run([ScriptCall(script=_WITHDRAW, keys=[self._key], args=[self._record.worker_id, self._epoch])])
        except PeerUnavailable as error:
            _log.warning("announcement not withdrawn, its lease runs out: %s", error.message)

    @property
    def _epoch(self) -> str:
        return f"{self._record.epoch:020d}"

    async def _renew(self) -> None:
        args: list[str | bytes | int] = [self._record.worker_id, self._epoch, self._lease_ms, msgspec.json.encode(self._record)]
        call = ScriptCall(script=_ANNOUNCE, keys=[self._key], args=args)
        said: str | None = None  # the trouble that the log has already
        while True:
            try:
                [is_latest] = await self._store.run([call])
                trouble = None if is_latest else "a later start of this worker is announced"
            except PeerUnavailable as error:
                trouble = error.message
            if trouble != said:
                _log.warning("not announced: %s", trouble) if trouble else _log.info("announced %s", self._record)
                said = trouble
            await asyncio.sleep(self._renewal_s if trouble is None else self._renewal_s / 4)


class RedisDiscovery:
    """Members whose leases live in Redis."""

    def __init__(self, store: RedisStore, *, namespace: str = "default", lease_s: float = LEASE_S, poll_s: float = POLL_S) -> None:
        self._store = store
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._keys = _keys(namespace)

    async def watch(self) -> AsyncIterator[frozenset[WorkerRecord]]:
        """The members whenever they have changed; first when Redis has answered for the first time."""
        known: frozenset[WorkerRecord] | None = None
        seen_mark: bytes | None = None
        lenient_until = 0.0
        is_away = False
        clock = asyncio.get_running_loop().time
        while True:
            try:
                # Every poll offers a mark of its own: data that were lost are never marked as before.
                [[mark, *records]] = await self._store.run([ScriptCall(script=_LIST, keys=self._keys, args=[uuid.uuid4().hex])])
            except PeerUnavailable as error:
                if not is_away:
                    _log.warning("members stay as they are: %s", error.message)
                is_away = True
            else:
                members = _decode(records)
                if known is not None and (is_away or mark != seen_mark):
                    # Leases may be missing because Redis was away, not because their workers are: give those time to renew.
                    lenient_until = clock() + self._lease_s
                if known is not None and clock() < lenient_until:
                    members = {record.worker_id: record for record in known} | members
                is_away, seen_mark = False, mark
                current = frozenset(members.values())
                if current != known:
                    known = current
                    yield known
            await asyncio.sleep(self._poll_s)


def _decode(records: Sequence[bytes]) -> dict[str, WorkerRecord]:
    members = {}
    for text in records:
        try:
            record = parse_record(text)
        except ValueError as error:
            _log.warning("an announcement that cannot be read is left out: %s", error)
        else:
            members[record.worker_id] = record
    return members


def parse_record(text: bytes) -> WorkerRecord:
    """An announcement as it lies in Redis. Raises ValueError for what no worker announces: anybody may have written it."""
    try:
        record = msgspec.json.decode(text, type=WorkerRecord)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not 0 < len(record.worker_id) <= MAX_WORKER_ID_CHARACTERS:
        raise ValueError(f"worker_id has {len(record.worker_id)} characters, not 1 … {MAX_WORKER_ID_CHARACTERS}")
    if not 0 <= record.epoch <= MAX_EPOCH:
        raise ValueError(f"epoch {record.epoch:.3g} of {record.worker_id} is outside [0, 2**64)")
    if record.role not in ROLES:
        raise ValueError(f"role {record.role[:32]!r} of {record.worker_id} is not one of {', '.join(ROLES)}")
    if not is_address(record.address):
        raise ValueError(f"address {record.address[:64]!r} of {record.worker_id} is not host:port")
    return record
