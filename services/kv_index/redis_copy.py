"""The index in Redis: who owns it, and every worker's blocks under a lease. Knows nothing of streams; every method raises PeerUnavailable.

    baton:{namespace}:index:owner               token of the instance that may write; a lease
    baton:{namespace}:index:workers             hash: worker_id → "epoch:sequence_number num_blocks"; a lease of the last one to write
    baton:{namespace}:index:blocks:worker_id    set of 16-byte hashes; the worker's lease

Every write names the position that it follows, and Redis compares that and the number of blocks: data that were lost, wholly or in part,
are noticed at the next sign of life. Nobody but the owner's token can write, so that a thawed instance harms nothing.
"""

import enum
import re
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from services.core.prefix_hash import HASH_BYTES
from services.kv_index.journal import Batch
from services.mesh.block_events import snapshot_parts
from services.mesh.redis_store import TIMEOUT_S, RedisStore, Script, ScriptCall

# Of one script run: Redis does nothing else meanwhile.
_MAX_SCRIPT_HASHES = 16384
_LOAD_TOGETHER = 16
_LOAD_TIMEOUT_S = 10.0
_WRITE_TIMEOUT_PER_HASH_S = 20e-6  # about twenty times what one takes

_OWN = Script("""
local owner = redis.call('GET', KEYS[1])
local predecessor = ARGV[4]
-- No instance makes an owner whose lease does not run: nobody would ever give it up.
if owner and redis.call('PTTL', KEYS[1]) == -1 then owner = false end
if owner == ARGV[1] or (not owner and ARGV[3] == '1')
    or (owner and predecessor ~= '' and string.sub(owner, 1, #predecessor) == predecessor) then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return {1, ARGV[2]}
end
return {0, redis.call('PTTL', KEYS[1])}
""")
_RELEASE = Script("if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return 1")
_WRITE = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'not owner' end
local worker, follows, position, lease_ms = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if follows == '' then
  redis.call('UNLINK', KEYS[3])
elseif redis.call('HGET', KEYS[2], worker) ~= follows .. ' ' .. redis.call('SCARD', KEYS[3]) then
  return 'refused'
end
local function each(command, packed)
  local step = 16 * 4000  -- unpack() takes less than 8000
  for start = 1, #packed, step do
    local hashes = {}
    for at = start, math.min(start + step, #packed + 1) - 1, 16 do hashes[#hashes + 1] = string.sub(packed, at, at + 15) end
    redis.call(command, KEYS[3], unpack(hashes))
  end
end
each('SREM', ARGV[6])
each('SADD', ARGV[7])
redis.call('HSET', KEYS[2], worker, position .. ' ' .. redis.call('SCARD', KEYS[3]))
redis.call('PEXPIRE', KEYS[2], lease_ms)
redis.call('PEXPIRE', KEYS[3], lease_ms)
return 'written'
""")
_FORGET = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'not owner' end
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('UNLINK', KEYS[3])
return 'written'
""")
_LIST = Script("return redis.call('HGETALL', KEYS[1])")
# A key of another kind is no set of ours: without blocks its worker is left out, and the next snapshot takes its place.
_SCAN = Script("""
local found = redis.pcall('SSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
if found.err then return {'0', ''} end
return {found[1], table.concat(found[2])}
""")
# What the workers' hash says of one: epoch, number of its last event, number of blocks.
_RECORD = re.compile(rb"(\d{1,20}):(\d{1,20}) (\d{1,20})")
_MAX_U64 = 2**64 - 1


class Outcome(enum.Enum):
    WRITTEN = b"written"
    REFUSED = b"refused"  # Redis does not have what the batch follows
    NOT_OWNER = b"not owner"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """Whether the index is ours; if not, after how long the other's lease lapses (None: nobody has it)."""

    ours: bool
    lapses_in_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWorker:
    """A worker as Redis has it."""

    worker_id: str
    epoch: int
    sequence_number: int
    hashes: set[bytes]


class RedisCopy:
    """One instance's view; `token` tells it from all others, and from earlier starts of itself."""

    def __init__(self, store: RedisStore, *, instance: str, namespace: str, lease_s: float, owner_lease_s: float) -> None:
        """`instance` names what only one process can be at a time, such as the address that it listens on."""
        self._store = store
        self._prefix = f"baton:{{{namespace}}}:index"
        self._owner, self._workers = f"{self._prefix}:owner", f"{self._prefix}:workers"
        self._lease_ms = int(lease_s * 1000)
        self._owner_lease_ms = int(owner_lease_s * 1000)
        self._predecessor = f"{instance} "
        self.token = self._predecessor + uuid.uuid4().hex

    async def own(self, *, may_take: bool) -> Ownership:
        """Renews our ownership, or takes the index when nobody has it and `may_take`. The first time also from an earlier start of us."""
        args: list[str | bytes | int] = [self.token, self._owner_lease_ms, int(may_take), self._predecessor]
        [[ours, lease_ms]] = await self._store.run([ScriptCall(script=_OWN, keys=[self._owner], args=args)])
        # Once only: should another live instance have the same name after all, the two would take it from each other for ever.
        self._predecessor = ""
        return Ownership(ours=bool(ours), lapses_in_s=int(lease_ms) / 1000 if int(lease_ms) >= 0 else None)

    async def release(self) -> None:
        """Gives the index up, if it is ours."""
        await self._store.run([ScriptCall(script=_RELEASE, keys=[self._owner], args=[self.token])])

    async def write(self, batches: Iterable[Batch]) -> list[Outcome]:
        """Writes batches in one round trip; each is written wholly or not at all, unless the connection breaks."""
        calls: list[ScriptCall] = []
        ends = []
        timeout_s = TIMEOUT_S
        for batch in batches:
            calls.extend(self._calls(batch))
            ends.append(len(calls) - 1)
            timeout_s += _WRITE_TIMEOUT_PER_HASH_S * (len(batch.stored) + len(batch.removed))
        answers = await self._store.run(calls, timeout_s=timeout_s) if calls else []
        # When one piece is refused, all that follow are: the last one speaks for the batch.
        return [Outcome(answers[end]) for end in ends]

    async def load(self) -> AsyncIterator[StoredWorker]:
        """Every worker whose lease lives and whose blocks are complete."""
        [fields] = await self._store.run([ScriptCall(script=_LIST, keys=[self._workers])])
        pairs = iter([(name, record) for name, record in zip(fields[::2], fields[1::2], strict=True) if _is_text(name)])
        while some := list(islice(pairs, _LOAD_TOGETHER)):
            worker_ids = [worker_id.decode() for worker_id, _ in some]
            scans = await self._store.run([self._scan(worker_id, b"0") for worker_id in worker_ids], timeout_s=_LOAD_TIMEOUT_S)
            for worker_id, (_, record), (cursor, packed) in zip(worker_ids, some, scans, strict=True):
                hashes = set(_split(packed))
                while cursor != b"0":
                    [[cursor, packed]] = await self._store.run([self._scan(worker_id, cursor)], timeout_s=_LOAD_TIMEOUT_S)
                    hashes.update(_split(packed))
                if (worker := _stored_worker(worker_id, record, hashes)) is not None:
                    yield worker

    def _keys(self, worker_id: str) -> list[str]:
        return [self._owner, self._workers, f"{self._prefix}:blocks:{worker_id}"]

    def _calls(self, batch: Batch) -> Iterator[ScriptCall]:
        """The runs that write a batch, in pieces when it is big; between them the position says that the worker is incomplete."""
        keys = self._keys(batch.worker_id)
        if batch.gone:
            yield ScriptCall(script=_FORGET, keys=keys, args=[self.token, batch.worker_id])
            return
        pieces = [(piece, b"") for piece in _pieces(batch.removed)] + [(b"", piece) for piece in _pieces(batch.stored)]
        if len(batch.removed) + len(batch.stored) <= _MAX_SCRIPT_HASHES:
            pieces = [(b"".join(batch.removed), b"".join(batch.stored))]
        follows = "" if batch.follows is None else f"{batch.epoch}:{batch.follows}"
        for number, (removed, stored) in enumerate(pieces, 1):
            position = f"{batch.epoch}:{batch.sequence_number}" + (f":{number}" if number < len(pieces) else "")
            args: list[str | bytes | int] = [self.token, batch.worker_id, follows, position, self._lease_ms, removed, stored]
            yield ScriptCall(script=_WRITE, keys=keys, args=args)
            follows = position

    def _scan(self, worker_id: str, cursor: bytes) -> ScriptCall:
        return ScriptCall(script=_SCAN, keys=[f"{self._prefix}:blocks:{worker_id}"], args=[cursor, _MAX_SCRIPT_HASHES])


def _stored_worker(worker_id: str, record: bytes, hashes: set[bytes]) -> StoredWorker | None:
    """None for a worker that was written in part only, or not by us: it is told anew by the worker itself."""
    read = _RECORD.fullmatch(record)
    if read is None or {len(block_hash) for block_hash in hashes} - {HASH_BYTES}:
        return None
    epoch, sequence_number, num_blocks = (int(number) for number in read.groups())
    # Events are numbered from 1, and each of them stored as many blocks as one may have.
    is_possible = epoch <= _MAX_U64 and snapshot_parts(num_blocks) <= sequence_number <= _MAX_U64
    if not is_possible or num_blocks != len(hashes):
        return None
    return StoredWorker(worker_id=worker_id, epoch=epoch, sequence_number=sequence_number, hashes=hashes)


def _is_text(name: bytes) -> bool:
    try:
        return bool(name.decode())
    except UnicodeDecodeError:
        return False


def _pieces(hashes: Iterable[bytes]) -> Iterator[bytes]:
    packed = b"".join(hashes)
    step = _MAX_SCRIPT_HASHES * HASH_BYTES
    return (packed[start : start + step] for start in range(0, len(packed), step))


def _split(packed: bytes) -> Sequence[bytes]:
    return [packed[start : start + HASH_BYTES] for start in range(0, len(packed), HASH_BYTES)]
