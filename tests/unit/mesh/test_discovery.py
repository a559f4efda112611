"""Discovery over a real Redis: members come, change and go with their leases, and stay while Redis cannot be trusted."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from protos.baton.v1 import common_pb2
from services.core.errors import ConfigurationError, PeerUnavailable
from services.mesh.discovery import Announcement, RedisDiscovery, StaticDiscovery, WorkerRecord, parse_record
from services.mesh.redis_server import RedisServer
from services.mesh.redis_store import RedisStore, Script, ScriptCall

LEASE_S = 0.6
FLUSH = ScriptCall(script=Script("return redis.call('FLUSHALL')"), keys=[])


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def record(number: int, epoch: int = 1) -> WorkerRecord:
    return WorkerRecord(worker_id=f"w{number}", epoch=epoch, role="decode", address=f"127.0.0.1:{7000 + number}")


def announced(store: RedisStore, worker: WorkerRecord, namespace: str = "default") -> Announcement:
    return Announcement(store, worker, namespace=namespace, lease_s=LEASE_S, renewal_s=0.1)


class Members:
    """What watch() said last, as it says it."""

    def __init__(self, store: RedisStore) -> None:
        self.history: list[set[WorkerRecord]] = []
        self._discovery = RedisDiscovery(store, lease_s=LEASE_S, poll_s=0.02)
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator["Members"]:
        watching = asyncio.create_task(self._watch())
        try:
            yield self
        finally:
            watching.cancel()
            await asyncio.wait((watching,))

    async def wait(self, *members: WorkerRecord) -> None:
        async with asyncio.timeout(10):
            while not self.history or self.history[-1] != set(members):
                self._changed.clear()
                await self._changed.wait()

    async def _watch(self) -> None:
        async for members in self._discovery.watch():
            self.history.append(set(members))
            self._changed.set()


def test_watch_when_workers_come_and_withdraw_then_tells_all_members_each_time(server: RedisServer) -> None:
    async def test() -> None:
        async with RedisStore(server.url) as store, Members(store).watched() as members:
            await members.wait()
            async with announced(store, record(1)):
                await members.wait(record(1))
                async with announced(store, record(2)) as second:
                    await members.wait(record(1), record(2))
                    await second.withdraw()
                    await members.wait(record(1))
                    await second.withdraw()
            await members.wait()
            assert members.history == [set(), {record(1)}, {record(1), record(2)}, {record(1)}, set()]

    asyncio.run(test())


def test_watch_when_a_worker_is_killed_then_it_is_a_member_until_its_lease_runs_out(server: RedisServer) -> None:
    program = f"""
import asyncio
from services.mesh.discovery import Announcement, WorkerRecord
from services.mesh.redis_store import RedisStore
async def main():
    async with RedisStore({server.url!r}) as store, Announcement(store, {record(1)!r}, lease_s={LEASE_S}, renewal_s=0.1):
        await asyncio.sleep(60)
asyncio.run(main())
"""

    async def test() -> None:
        async with RedisStore(server.url) as store, Members(store).watched() as members, announced(store, record(2)):
            worker = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
            await members.wait(record(1), record(2))
            worker.kill()
            await worker.wait()
            await members.wait(record(2))

    asyncio.run(test())


def test_watch_when_a_worker_starts_again_then_the_later_epoch_takes_its_place(server: RedisServer) -> None:
    async def test() -> None:
        async with RedisStore(server.url) as store, Members(store).watched() as members, contextlib.AsyncExitStack() as stack:
            old = await stack.enter_async_context(announced(store, record(1, epoch=9)))
            await members.wait(record(1, epoch=9))
            await stack.enter_async_context(announced(store, record(1, epoch=10)))
            await members.wait(record(1, epoch=10))
            told = len(members.history)
            await stack.enter_async_context(announced(store, record(3)))
            await asyncio.sleep(0.3)  # the earlier start goes on announcing itself meanwhile
            await old.withdraw()  # takes back its own announcement only
            await stack.enter_async_context(announced(store, record(2)))
            await members.wait(record(1, epoch=10), record(2), record(3))
            assert all(record(1, epoch=10) in seen for seen in members.history[told - 1 :])

    asyncio.run(test())


def test_watch_when_another_namespace_has_members_then_they_are_not_ours(server: RedisServer) -> None:
    async def test() -> None:
        async with RedisStore(server.url) as store, Members(store).watched() as members:
            async with announced(store, record(1), namespace="other"), announced(store, record(2)):
                await members.wait(record(2))
            assert all(record(1) not in seen for seen in members.history)

    asyncio.run(test())


def test_watch_when_redis_restarts_empty_then_no_living_member_is_ever_missing(server: RedisServer) -> None:
    async def test() -> None:
        async with RedisStore(server.url) as store, Members(store).watched() as members, announced(store, record(1)):
            await members.wait(record(1))
            told = len(members.history)
            server.kill()
            await asyncio.sleep(0.1)
            server.start()
            async with announced(store, record(2)):
                await members.wait(record(1), record(2))
            await members.wait(record(1))
            assert all(record(1) in seen for seen in members.history[told:])

    asyncio.run(test())


class ScriptedStore(RedisStore):
    """A Redis that comes back with its old data and all leases over: that takes too long with a real one."""

    def __init__(self, answers: Sequence[list[bytes] | PeerUnavailable]) -> None:
        self._answers = list(answers)

    async def run(self, calls: Sequence[ScriptCall], *, timeout_s: float | None = None) -> list[Any]:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, PeerUnavailable):
            raise answer
        return [answer]


def test_watch_when_redis_was_away_for_longer_than_the_leases_then_members_stay_until_they_could_renew() -> None:
    present, away, nobody = [b"mark", msgspec.json.encode(record(1))], PeerUnavailable("redis: away"), [b"mark"]

    async def test() -> None:
        async with Members(ScriptedStore([present, away, nobody, nobody, present, nobody])).watched() as members:
            await members.wait(record(1))
            await members.wait()
            assert members.history == [{record(1)}, set()]
        async with Members(ScriptedStore([present, nobody])).watched() as members:
            await members.wait()

    started = time.monotonic()
    asyncio.run(test())
    assert time.monotonic() - started >= LEASE_S


def test_watch_when_redis_loses_its_data_then_the_living_stay_and_the_dead_go(server: RedisServer) -> None:
    async def test() -> None:
        async with RedisStore(server.url) as store, Members(store).watched() as members, announced(store, record(1)):
            async with RedisStore(server.url) as doomed:
                worker = announced(doomed, record(2))
                await worker.__aenter__()
                await members.wait(record(1), record(2))
                told = len(members.history)
                await store.run([FLUSH])
                await worker.__aexit__()
            await members.wait(record(1))
            assert all(record(1) in seen for seen in members.history[told:])

    asyncio.run(test())


SPOIL = Script("return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])")
LIVES = b"00000000000000000001 99999999999999 "
UNREADABLE = {
    "not JSON": b"{broken",
    "no object": b"[1, 2]",
    "not UTF-8": b'{"worker_id":"\xff","epoch":1,"role":"decode","address":"h:1"}',
    "a field is missing": b'{"worker_id":"w9","epoch":1,"role":"decode"}',
    "a field of another type": b'{"worker_id":"w9","epoch":"1","role":"decode","address":"h:1"}',
    "no such role": b'{"worker_id":"w9","epoch":1,"role":"planner","address":"h:1"}',
    "no name": b'{"worker_id":"","epoch":1,"role":"decode","address":"h:1"}',
    "a name without end": b'{"worker_id":"' + b"w" * 100_000 + b'","epoch":1,"role":"decode","address":"h:1"}',
    "an epoch below zero": b'{"worker_id":"w9","epoch":-1,"role":"decode","address":"h:1"}',
    "an epoch of more than 64 bits": b'{"worker_id":"w9","epoch":18446744073709551616,"role":"decode","address":"h:1"}',
    "no port": b'{"worker_id":"w9","epoch":1,"role":"decode","address":"h"}',
    "a port beyond the last one": b'{"worker_id":"w9","epoch":1,"role":"decode","address":"h:65536"}',
    "no host": b'{"worker_id":"w9","epoch":1,"role":"decode","address":":80"}',
    "deep": b'{"x":' + b"[" * 100_000,
}


def test_watch_when_announcements_cannot_be_read_then_they_are_left_out(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with RedisStore(server.url) as store, announced(store, record(1)):
            for name, text in UNREADABLE.items():
                await store.run([ScriptCall(script=SPOIL, keys=["baton:{default}:members"], args=[name, LIVES + text])])
            async with Members(store).watched() as members:
                await members.wait(record(1))

    asyncio.run(test())
    assert caplog.text.count("cannot be read") >= len(UNREADABLE)


@pytest.mark.parametrize("text", [b"", b"junk", b"12 13", b"x y z", b" 99999999999999 ", LIVES[:20]])
def test_watch_when_a_field_is_no_announcement_at_all_then_the_workers_are_found_and_can_announce_themselves(
    server: RedisServer, text: bytes
) -> None:
    """The bug that this keeps away: one such field made the script fail, and with it every look at the members."""

    async def test() -> None:
        async with RedisStore(server.url) as store:
            spoil = [ScriptCall(script=SPOIL, keys=["baton:{default}:members"], args=[name, text]) for name in ("w1", "w9")]
            await store.run(spoil)
            async with announced(store, record(1)), Members(store).watched() as members:
                await members.wait(record(1))
                await store.run(spoil[1:])
                async with announced(store, record(2)):
                    await members.wait(record(1), record(2))

    asyncio.run(test())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
FIELDS: dict[str, st.SearchStrategy[object]] = {
    "worker_id": JSON | st.just("w1"),
    "epoch": JSON | st.integers(0, 2**64),
    "role": JSON | st.sampled_from(["prefill", "decode"]),
    "address": JSON | st.sampled_from(["h:1", "[::1]:65535", "h:99999"]),
}


@given(
    st.binary(max_size=200)
    | st.fixed_dictionaries({}, optional=FIELDS).map(json.dumps).map(str.encode)
    | JSON.map(json.dumps).map(str.encode)
)
def test_record_when_its_text_is_anything_is_one_that_a_worker_may_have_announced_or_a_value_error(text: bytes) -> None:
    try:
        found = parse_record(text)
    except ValueError:
        return
    assert common_pb2.WorkerId(worker_id=found.worker_id, epoch=found.epoch).ByteSize() < 1200
    assert StaticDiscovery.parse([f"{found.role}={found.address}"])
    assert parse_record(msgspec.json.encode(found)) == found


def test_announcement_when_redis_is_away_then_entering_and_leaving_do_not_fail(caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer() as gone:
        url = gone.url

    async def test() -> None:
        async with RedisStore(url) as store, announced(store, record(1)):
            await asyncio.sleep(0.05)

    asyncio.run(test())
    assert "not announced: redis:" in caplog.text
    assert "not withdrawn" in caplog.text


def test_static_discovery_when_parsed_then_gives_its_members_and_never_ends() -> None:
    discovery = StaticDiscovery.parse(["prefill=10.0.0.1:7000", "decode=d1@[::1]:7001"])

    async def test() -> None:
        members = discovery.watch()
        assert await anext(members) == {
            WorkerRecord(worker_id="10.0.0.1:7000", epoch=0, role="prefill", address="10.0.0.1:7000"),
            WorkerRecord(worker_id="d1", epoch=0, role="decode", address="[::1]:7001"),
        }
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(members)

    asyncio.run(test())


def test_static_discovery_when_entries_are_wrong_then_names_them_all() -> None:
    with pytest.raises(ConfigurationError) as caught:
        StaticDiscovery.parse(
            [
                *["prefill", "decode=host", "decode=:80", "decode=h:0", "decode=h:²", "decod=h:80", "decode=h:80", "decode=h:80"],
                "decode=h:" + "8" * 5000,
            ]
        )
    assert len(caught.value.problems) == 8
