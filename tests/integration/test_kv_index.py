"""The index as processes, over a real Redis: whoever dies, freezes or forgets, replicas end at the truth, within two seconds.

The deadline of two seconds is the promise; on an idle machine all but the takeovers end within some 0.3 s, and those within 1.2 s.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.baton.v1 import common_pb2, kv_index_pb2, kv_index_pb2_grpc
from services.core.prefix_index import PrefixIndex
from services.kv_index.redis_copy import RedisCopy
from services.mesh.block_events import MAX_EVENT_HASHES, snapshot_events
from services.mesh.client import open_channel
from services.mesh.index_client import IndexPublisher, IndexReplica
from services.mesh.redis_server import RedisServer
from services.mesh.redis_store import RedisStore, Script, ScriptCall
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
CONVERGED_S = 2.0
HASHES = [number.to_bytes(16, "big") for number in range(20_000)]
FLUSH = ScriptCall(script=Script("return redis.call('FLUSHALL')"), keys=[])


class Instance:
    """A kv_index process on a port of its own, to be killed and started again."""

    def __init__(self, redis_url: str | None, **settings: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        if redis_url is not None:
            settings["redis_url"] = redis_url
        self._environment = {f"BATON_{name.upper()}": value for name, value in ({"listen": self.address} | settings).items()}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")} | self._environment
        self.process = subprocess.Popen([sys.executable, "-m", "services.kv_index"], cwd=ROOT, env=environment)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait()

    async def match(self, hashes: list[bytes]) -> list[tuple[str, int]]:
        async with open_channel(self.address) as channel:
            request = kv_index_pb2.MatchRequest(hashes=b"".join(hashes))
            response = await kv_index_pb2_grpc.KVIndexServiceStub(channel).Match(request, timeout=5)
            return [(match.worker_id, match.num_blocks) for match in response.matches]

    async def serves(self) -> bool:
        """False while it says that it does not; raises AssertionError when it says anything else."""
        try:
            await self.match([])
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True

    async def wait_serving(self) -> None:
        await wait_until(self.serves, 20)

    async def wait_listening(self) -> None:
        async with open_channel(self.address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 20)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def instance(redis: RedisServer) -> Iterator[Instance]:
    instance = Instance(redis.url)
    instance.start()
    yield instance
    instance.kill()


@pytest.fixture
def standby(redis: RedisServer) -> Iterator[Instance]:
    """Not started yet."""
    instance = Instance(redis.url)
    yield instance
    instance.kill()


def publisher(*instances: Instance, worker_id: str = "w", epoch: int = 1) -> IndexPublisher:
    return IndexPublisher([instance.address for instance in instances], worker_id=worker_id, epoch=epoch)


def replica_of(*instances: Instance) -> IndexReplica:
    return IndexReplica([instance.address for instance in instances])


def holds(replica: IndexReplica, hashes: list[bytes], worker_id: str = "w") -> bool:
    return replica.index.hashes(worker_id) == set(hashes)


async def stored_in(redis: RedisServer) -> dict[str, tuple[int, set[bytes]]]:
    """(epoch, blocks) of every worker, as a restarted index would load them."""
    async with RedisStore(redis.url) as store:
        copy = RedisCopy(store, instance="test", namespace="default", lease_s=1, owner_lease_s=1)
        return {worker.worker_id: (worker.epoch, worker.hashes) async for worker in copy.load()}


async def wait_stored(redis: RedisServer, hashes: list[bytes], worker_id: str = "w") -> None:
    async def is_stored() -> bool:
        return (await stored_in(redis)).get(worker_id) == (1, set(hashes))

    await wait_until(is_stored)


async def flush(redis: RedisServer) -> None:
    async with RedisStore(redis.url) as store:
        await store.run([FLUSH])


async def is_forgotten(redis: RedisServer, worker_id: str) -> bool:
    return worker_id not in await stored_in(redis)


async def is_refused(instance: Instance) -> bool:
    return not await instance.serves()


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_index_when_it_is_killed_again_and_again_then_replicas_converge_and_nothing_is_lost(redis: RedisServer, instance: Instance) -> None:
    async def test() -> None:
        async with replica_of(instance) as replica, publisher(instance) as worker:
            worker.publish_nowait(stored=HASHES[:1000])
            await wait_until(lambda: holds(replica, HASHES[:1000]) and worker.all_acknowledged)
            for restart in range(1, 4):
                instance.kill()
                worker.publish_nowait(stored=HASHES[1000 + restart : 1001 + restart], removed=HASHES[restart - 1 : restart])
                instance.start()
                await instance.wait_serving()
                expected = HASHES[restart:1000] + HASHES[1001 : 1001 + restart]
                await wait_until(partial(holds, replica, expected), CONVERGED_S)
                await wait_until(lambda: worker.all_acknowledged, CONVERGED_S)
                assert await stored_in(redis) == {"w": (1, set(expected))}

    run(test())


def test_index_when_it_restarts_before_a_worker_is_back_then_serves_what_redis_has(instance: Instance) -> None:
    hashes = HASHES[: MAX_EVENT_HASHES + 5]

    async def test() -> None:
        await instance.wait_serving()
        async with open_channel(instance.address) as channel:
            call = kv_index_pb2_grpc.KVIndexServiceStub(channel).Publish()
            for event in snapshot_events(common_pb2.WorkerId(worker_id="w", epoch=1), 1, hashes):
                await call.write(kv_index_pb2.PublishRequest(event=event))
            while (await call.read()).sequence_number < 2:
                pass
        instance.kill()
        instance.start()
        await instance.wait_serving()
        assert await instance.match(hashes) == [("w", len(hashes))]
        async with replica_of(instance) as replica:
            await wait_until(lambda: replica.synchronized)
            assert holds(replica, hashes)
            assert replica.index.position("w") == (1, 2)

    run(test())


def test_index_when_redis_is_flushed_then_workers_tell_all_again(redis: RedisServer, instance: Instance) -> None:
    async def test() -> None:
        async with replica_of(instance) as replica, publisher(instance) as busy, publisher(instance, worker_id="idle") as idle:
            busy.publish_nowait(stored=HASHES[:100])
            idle.publish_nowait(stored=HASHES[:50])
            await wait_until(lambda: holds(replica, HASHES[:100]) and holds(replica, HASHES[:50], "idle"))
            await flush(redis)
            busy.publish_nowait(stored=HASHES[100:110])
            await wait_until(lambda: holds(replica, HASHES[:110]), CONVERGED_S)
            await wait_stored(redis, HASHES[:110])
            await wait_stored(redis, HASHES[:50], "idle")
            await wait_until(lambda: busy.all_acknowledged and idle.all_acknowledged)
            assert holds(replica, HASHES[:110]) and holds(replica, HASHES[:50], "idle")

    run(test())


def test_index_when_redis_is_flushed_and_it_is_killed_at_once_then_replicas_converge(redis: RedisServer, instance: Instance) -> None:
    async def test() -> None:
        async with replica_of(instance) as replica, publisher(instance) as worker:
            worker.publish_nowait(stored=HASHES)
            await wait_until(lambda: holds(replica, HASHES) and worker.all_acknowledged)
            await flush(redis)
            instance.kill()
            instance.start()
            await instance.wait_serving()
            worker.publish_nowait(removed=HASHES[:1])
            await wait_until(lambda: replica.synchronized and holds(replica, HASHES[1:]) and worker.all_acknowledged, CONVERGED_S)
            await wait_stored(redis, HASHES[1:])

    run(test())


def test_index_when_redis_dies_and_comes_back_then_it_serves_throughout(redis: RedisServer, instance: Instance) -> None:
    async def test() -> None:
        async with replica_of(instance) as replica, publisher(instance) as worker:
            worker.publish_nowait(stored=HASHES[:100])
            await wait_until(lambda: holds(replica, HASHES[:100]) and worker.all_acknowledged)
            redis.kill()
            worker.publish_nowait(stored=HASHES[100:101])
            await wait_until(lambda: holds(replica, HASHES[:101]) and worker.all_acknowledged, CONVERGED_S)
            assert await instance.match(HASHES[:101]) == [("w", 101)]
            redis.start()
            worker.publish_nowait(stored=HASHES[101:102])
            await wait_stored(redis, HASHES[:102])
            await wait_until(lambda: worker.all_acknowledged)
            assert replica.num_subscriptions == 1

    run(test())


class RememberingIndex(PrefixIndex):
    """Keeps all snapshots that it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshots: list[set[bytes]] = []

    def replace(self, worker_id: str, *, epoch: int, sequence_number: int, hashes: Iterable[bytes]) -> None:
        self.snapshots.append(set(hashes))
        super().replace(worker_id, epoch=epoch, sequence_number=sequence_number, hashes=hashes)


def test_index_when_redis_freezes_and_thaws_then_its_old_data_never_replace_newer_ones(redis: RedisServer, instance: Instance) -> None:
    async def test() -> None:
        replica = replica_of(instance)
        replica.index = index = RememberingIndex()
        async with replica, publisher(instance) as worker:
            worker.publish_nowait(stored=HASHES[:100])
            await wait_until(lambda: holds(replica, HASHES[:100]) and worker.all_acknowledged)
            told = len(index.snapshots)
            os.kill(redis.pid, signal.SIGSTOP)
            try:
                worker.publish_nowait(stored=HASHES[100:101])
                await worker.wait_acknowledged()  # from memory alone
                worker.publish_nowait(stored=HASHES[101:102])
                await worker.wait_acknowledged()
            finally:
                os.kill(redis.pid, signal.SIGCONT)
            await wait_stored(redis, HASHES[:102])
            assert holds(replica, HASHES[:102])
            assert all(snapshot == set(HASHES[:102]) for snapshot in index.snapshots[told:])

    run(test())


def test_instances_when_each_served_without_redis_then_one_stands_by_when_it_comes(
    redis: RedisServer, instance: Instance, standby: Instance
) -> None:
    async def test() -> None:
        redis.stop()
        standby.start()
        async with contextlib.AsyncExitStack() as stack:
            workers, replicas = [], []
            for number, order in enumerate([(instance, standby), (standby, instance)]):
                await order[0].wait_serving()
                replicas.append(await stack.enter_async_context(replica_of(*order)))
                workers.append(await stack.enter_async_context(publisher(*order, worker_id=f"w{number}")))
                workers[number].publish_nowait(stored=HASHES[:100])
            await wait_until(lambda: all(holds(replicas[number], HASHES[:100], f"w{number}") for number in range(2)))
            assert "w1" not in replicas[0].index and "w0" not in replicas[1].index
            redis.start()
            await wait_until(lambda: all(holds(replica, HASHES[:100], worker_id) for replica in replicas for worker_id in ("w0", "w1")))
            assert sorted([await instance.serves(), await standby.serves()]) == [False, True]
            for number in range(2):
                await wait_stored(redis, HASHES[:100], f"w{number}")

    run(test())


def test_index_when_redis_is_not_there_at_the_start_then_serves_from_memory_and_attaches_later(
    redis: RedisServer, standby: Instance
) -> None:
    async def test() -> None:
        redis.stop()
        standby.start()
        async with replica_of(standby) as replica, publisher(standby) as worker:
            worker.publish_nowait(stored=HASHES[:100])
            await wait_until(lambda: holds(replica, HASHES[:100]) and worker.all_acknowledged)
            redis.start()
            await wait_stored(redis, HASHES[:100])
            assert replica.num_subscriptions == 1

    run(test())


def test_publish_when_redis_does_not_have_an_event_yet_then_it_is_not_acknowledged(redis: RedisServer, instance: Instance) -> None:
    async def test() -> None:
        async with replica_of(instance) as replica, publisher(instance) as worker:
            worker.publish_nowait(stored=HASHES[:10])
            await wait_until(lambda: holds(replica, HASHES[:10]) and worker.all_acknowledged)
            os.kill(redis.pid, signal.SIGSTOP)
            try:
                worker.publish_nowait(stored=HASHES[10:11])
                # Routers do not wait for Redis. A false alarm needs a machine that stalls for the second after which Redis is given up.
                await wait_until(lambda: holds(replica, HASHES[:11]))
                assert not worker.all_acknowledged
            finally:
                os.kill(redis.pid, signal.SIGCONT)
            await wait_until(lambda: worker.all_acknowledged)
            await wait_stored(redis, HASHES[:11])

    run(test())


def test_standby_when_the_owner_is_killed_then_takes_over_with_all_it_knew(
    redis: RedisServer, instance: Instance, standby: Instance
) -> None:
    async def test() -> None:
        await instance.wait_serving()
        standby.start()
        async with replica_of(instance, standby) as replica, publisher(instance, standby) as worker:
            worker.publish_nowait(stored=HASHES[:100])
            await wait_until(lambda: holds(replica, HASHES[:100]) and worker.all_acknowledged)
            await standby.wait_listening()
            assert await is_refused(standby)
            instance.kill()
            worker.publish_nowait(stored=HASHES[100:101])
            await wait_until(lambda: holds(replica, HASHES[:101]) and worker.all_acknowledged, CONVERGED_S)
            assert await standby.match(HASHES[:101]) == [("w", 101)]
            assert await stored_in(redis) == {"w": (1, set(HASHES[:101]))}

    run(test())


def test_standby_when_the_owner_freezes_then_takes_over_and_the_thawed_one_stands_by(
    redis: RedisServer, instance: Instance, standby: Instance
) -> None:
    async def test() -> None:
        await instance.wait_serving()
        standby.start()
        async with replica_of(instance, standby) as replica, publisher(instance, standby) as worker:
            worker.publish_nowait(stored=HASHES[:100])
            await wait_until(lambda: holds(replica, HASHES[:100]) and worker.all_acknowledged)
            instance.signal(signal.SIGSTOP)
            worker.publish_nowait(stored=HASHES[100:101])
            await wait_until(lambda: holds(replica, HASHES[:101]) and worker.all_acknowledged)
            instance.signal(signal.SIGCONT)
            await wait_until(lambda: is_refused(instance))
            worker.publish_nowait(stored=HASHES[101:102])
            await wait_until(lambda: holds(replica, HASHES[:102]) and worker.all_acknowledged)
            assert await stored_in(redis) == {"w": (1, set(HASHES[:102]))}

    run(test())


def test_standby_when_redis_is_flushed_then_the_owner_keeps_the_index(redis: RedisServer, instance: Instance, standby: Instance) -> None:
    """In one round of three: an owner that a busy machine lets wait for its whole lease loses the index with good reason."""

    async def test() -> None:
        await instance.wait_serving()
        standby.start()
        await standby.wait_listening()
        async with replica_of(instance, standby) as replica, publisher(instance, standby) as worker:
            worker.publish_nowait(stored=HASHES[:100])
            await wait_until(lambda: holds(replica, HASHES[:100]) and worker.all_acknowledged)
            # The owner's next renewal or the worker's next heartbeat is the first to notice; the standby looks more often than either.
            for _ in range(3):
                num_subscriptions = replica.num_subscriptions
                for _ in range(4):
                    await flush(redis)
                    await wait_stored(redis, HASHES[:100])
                if replica.num_subscriptions == num_subscriptions:
                    return
            raise AssertionError("the index changes hands each time that Redis is flushed")

    run(test())


def test_owner_when_it_stops_cleanly_then_exits_with_zero_and_the_standby_serves(instance: Instance, standby: Instance) -> None:
    async def test() -> None:
        await instance.wait_serving()
        standby.start()
        async with replica_of(instance, standby) as replica, publisher(instance, standby) as worker:
            worker.publish_nowait(stored=HASHES[:100])
            await wait_until(lambda: holds(replica, HASHES[:100]) and worker.all_acknowledged)
            assert instance.terminate() == 0
            await standby.wait_serving()
            worker.publish_nowait(stored=HASHES[100:101])
            await wait_until(lambda: holds(replica, HASHES[:101]) and worker.all_acknowledged, CONVERGED_S)

    run(test())


def test_worker_when_it_restarts_then_redis_and_replicas_have_the_new_epoch_only(redis: RedisServer, instance: Instance) -> None:
    async def test() -> None:
        async with replica_of(instance) as replica, publisher(instance) as old:
            old.publish_nowait(stored=HASHES[:100])
            await wait_until(lambda: holds(replica, HASHES[:100]) and old.all_acknowledged)
            async with publisher(instance, epoch=2) as new:
                new.publish_nowait(stored=HASHES[200:210])
                await wait_until(lambda: holds(replica, HASHES[200:210]) and new.all_acknowledged, CONVERGED_S)
                old.publish_nowait(stored=HASHES[300:310])
                instance.kill()
                instance.start()
                await instance.wait_serving()
                new.publish_nowait(stored=HASHES[210:211])
                await wait_until(lambda: holds(replica, HASHES[200:211]) and new.all_acknowledged, CONVERGED_S)
                assert await stored_in(redis) == {"w": (2, set(HASHES[200:211]))}

    run(test())


def test_worker_when_it_is_killed_then_its_entries_vanish_with_its_lease(redis: RedisServer) -> None:
    program = """
import asyncio, sys
from services.mesh.index_client import IndexPublisher
async def main():
    async with IndexPublisher([sys.argv[1]], worker_id="w", epoch=1) as worker:
        worker.publish_nowait(stored=[b"x" * 16])
        await asyncio.sleep(60)
asyncio.run(main())
"""

    async def test(instance: Instance) -> None:
        async with replica_of(instance) as replica, publisher(instance, worker_id="other") as other:
            other.publish_nowait(stored=HASHES[:5])
            worker = await asyncio.create_subprocess_exec(sys.executable, "-c", program, instance.address, cwd=ROOT)
            await wait_until(lambda: holds(replica, [b"x" * 16]))
            worker.kill()
            await worker.wait()
            await wait_until(lambda: "w" not in replica.index)
            await wait_until(lambda: is_forgotten(redis, "w"))
            assert holds(replica, HASHES[:5], "other")

    instance = Instance(redis.url, lease_s="3")
    instance.start()
    try:
        run(test(instance))
    finally:
        instance.kill()


def test_watch_when_a_router_does_not_read_then_it_is_cut_off_and_the_others_are_not(redis: RedisServer) -> None:
    async def test(instance: Instance) -> None:
        await instance.wait_serving()
        async with replica_of(instance) as replica, publisher(instance) as worker, open_channel(instance.address) as channel:
            slow = kv_index_pb2_grpc.KVIndexServiceStub(channel).Watch(kv_index_pb2.WatchRequest())
            while not (await slow.read()).synchronized:
                pass
            held: list[bytes] = []
            for number in range(100):
                block = [(number * MAX_EVENT_HASHES + at).to_bytes(16, "big") for at in range(MAX_EVENT_HASHES)]
                worker.publish_nowait(stored=block, removed=held)
                held = block
                await wait_until(partial(holds, replica, held))
            assert replica.num_subscriptions == 1
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_all(slow)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with replica_of(instance) as again:
            await wait_until(lambda: again.synchronized)

    instance = Instance(redis.url, watch_buffer_bytes=str(1 << 18))
    instance.start()
    try:
        run(test(instance))
    finally:
        instance.kill()


def test_match_when_workers_hold_prefixes_then_gives_the_longest_first(instance: Instance) -> None:
    async def test() -> None:
        async with publisher(instance, worker_id="a") as a, publisher(instance, worker_id="b") as b, publisher(instance) as other:
            a.publish_nowait(stored=HASHES[:3])
            b.publish_nowait(stored=HASHES[:7])
            other.publish_nowait(stored=HASHES[1:])
            await wait_until(lambda: a.all_acknowledged and b.all_acknowledged and other.all_acknowledged)
            assert await instance.match(HASHES[:5]) == [("b", 5), ("a", 3)]
            assert await instance.match(HASHES[8:10]) == [("w", 2)]
            async with open_channel(instance.address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await kv_index_pb2_grpc.KVIndexServiceStub(channel).Match(kv_index_pb2.MatchRequest(hashes=b"x" * 17), timeout=5)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(test())
