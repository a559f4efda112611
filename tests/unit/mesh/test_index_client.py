"""Publisher and replica over a real index service: whatever is lost, the replica ends at the truth, and nobody is failed by it."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import grpc
import pytest

from protos.baton.v1 import common_pb2, kv_index_pb2, kv_index_pb2_grpc
from services.core.errors import Unavailable
from services.core.prefix_index import PrefixIndex
from services.mesh import index_client
from services.mesh.block_events import MAX_EVENT_HASHES, snapshot_events
from services.mesh.client import open_channel
from services.mesh.index_client import IndexPublisher, IndexReplica
from services.mesh.server import MeshServer
from tests.unit.mesh.index_serving import first_event_lost, serving_index
from tests.waiting import wait_until

HASHES = [number.to_bytes(16, "big") for number in range(100)]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def publisher(*addresses: str, epoch: int = 1, worker_id: str = "w", heartbeat_s: float = 0.1) -> IndexPublisher:
    return IndexPublisher(addresses, worker_id=worker_id, epoch=epoch, heartbeat_s=heartbeat_s)


def holds(replica: IndexReplica, hashes: list[bytes], worker_id: str = "w") -> bool:
    return replica.index.hashes(worker_id) == set(hashes)


@pytest.fixture
def dead_address() -> Iterator[str]:
    """An address that refuses connections as long as the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def test_replica_when_a_worker_publishes_then_holds_what_it_holds() -> None:
    async def test() -> None:
        async with serving_index() as served, IndexReplica([served.address]) as replica, publisher(served.address) as worker:
            worker.publish_nowait(stored=HASHES[:10])
            await wait_until(lambda: holds(replica, HASHES[:10]))
            worker.publish_nowait(stored=HASHES[10:12], removed=HASHES[:1])
            await wait_until(lambda: holds(replica, HASHES[1:12]) and worker.all_acknowledged)
            assert replica.synchronized
            assert replica.silence_s is not None and replica.silence_s < 5

    run(test())


def test_replica_when_it_comes_later_then_gets_a_snapshot_of_every_worker() -> None:
    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            served = await stack.enter_async_context(serving_index())
            for number in range(5):
                worker = await stack.enter_async_context(publisher(served.address, worker_id=f"w{number}"))
                worker.publish_nowait(stored=HASHES[number:])
            await wait_until(lambda: served.keeper.index.num_entries == 100 + 99 + 98 + 97 + 96)
            replica = await stack.enter_async_context(IndexReplica([served.address]))
            await wait_until(lambda: replica.synchronized)
            assert all(holds(replica, HASHES[number:], f"w{number}") for number in range(5))

    run(test())


def test_replica_when_a_worker_is_bigger_than_one_event_then_gets_all_of_it() -> None:
    hashes = [number.to_bytes(16, "big") for number in range(5 * MAX_EVENT_HASHES + 7)]

    async def test() -> None:
        async with serving_index() as served, publisher(served.address) as worker:
            worker.publish_nowait(stored=hashes)
            await wait_until(lambda: worker.all_acknowledged)
            async with IndexReplica([served.address]) as replica:
                await wait_until(lambda: replica.synchronized)
                assert holds(replica, hashes)
                worker.publish_nowait(removed=hashes[:1])
                await wait_until(lambda: holds(replica, hashes[1:]))

    run(test())


def test_publisher_when_an_event_is_lost_on_the_way_then_the_index_asks_for_a_snapshot() -> None:
    async def test() -> None:
        async with serving_index() as served, IndexReplica([served.address]) as replica, publisher(served.address) as worker:
            served.keep_published = first_event_lost(lambda event: event.stored == HASHES[5])
            worker.publish_nowait(stored=HASHES[:5])
            await wait_until(lambda: holds(replica, HASHES[:5]))
            worker.publish_nowait(stored=HASHES[5:6], removed=HASHES[:1])  # is lost; nothing follows but heartbeats
            await wait_until(lambda: holds(replica, HASHES[1:6]), timeout_s=2)

    run(test())


def test_publisher_when_its_stream_breaks_then_sends_again_what_was_not_acknowledged_and_no_snapshot() -> None:
    async def test() -> None:
        async with serving_index() as served, publisher(served.address) as worker:
            await worker.wait_acknowledged()
            heard: list[kv_index_pb2.BlockEvent] = []

            def break_once(event: kv_index_pb2.BlockEvent) -> bool:
                heard.append(event)
                if len(heard) == 1:
                    raise Unavailable("not now")
                return True

            served.keep_published = break_once
            worker.publish_nowait(stored=HASHES[:5])
            await worker.wait_acknowledged()
            assert served.keeper.index.hashes("w") == set(HASHES[:5])
            assert heard[0] == heard[1]
            assert not any(event.snapshot for event in heard)

    run(test())


def test_publisher_when_the_same_worker_opens_another_stream_then_the_first_one_ends() -> None:
    async def test() -> None:
        async with serving_index() as served, open_channel(served.address) as channel:
            calls = []
            for number in (1, 2):
                call = kv_index_pb2_grpc.KVIndexServiceStub(channel).Publish()
                [event] = snapshot_events(common_pb2.WorkerId(worker_id="w", epoch=1), number, HASHES[:5])
                await call.write(kv_index_pb2.PublishRequest(event=event))
                assert (await call.read()).sequence_number == number
                calls.append(call)
            assert await calls[0].code() is grpc.StatusCode.UNAVAILABLE
            calls[1].cancel()

    run(test())


def test_replica_when_its_stream_loses_an_event_then_subscribes_anew() -> None:
    async def test() -> None:
        async with serving_index() as served, IndexReplica([served.address]) as replica, publisher(served.address) as worker:
            worker.publish_nowait(stored=HASHES[:5])
            await wait_until(lambda: holds(replica, HASHES[:5]))
            served.keep_watched = first_event_lost(lambda event: bool(event.removed))
            worker.publish_nowait(removed=HASHES[:1])
            await wait_until(lambda: served.keeper.index.hashes("w") == set(HASHES[1:5]))
            worker.publish_nowait(stored=HASHES[5:6])
            await wait_until(lambda: holds(replica, HASHES[1:6]), timeout_s=2)
            assert served.num_watches == 2

    run(test())


def test_replica_when_it_disowned_blocks_then_a_later_event_brings_them_back() -> None:
    async def test() -> None:
        async with serving_index() as served, IndexReplica([served.address]) as replica, publisher(served.address) as worker:
            worker.publish_nowait(stored=HASHES[:5])
            await wait_until(lambda: holds(replica, HASHES[:5]))
            replica.index.disown("w", HASHES[:2])
            worker.publish_nowait(removed=HASHES[:1])
            await wait_until(lambda: worker.all_acknowledged)
            assert holds(replica, HASHES[2:5])
            worker.publish_nowait(stored=HASHES[:1])
            await wait_until(lambda: holds(replica, [HASHES[0], *HASHES[2:5]]))

    run(test())


def test_replica_when_a_worker_restarts_then_only_the_new_epoch_counts() -> None:
    async def test() -> None:
        async with serving_index() as served, IndexReplica([served.address]) as replica, publisher(served.address) as old:
            old.publish_nowait(stored=HASHES[:5])
            await wait_until(lambda: holds(replica, HASHES[:5]))
            async with publisher(served.address, epoch=2) as new:
                new.publish_nowait(stored=HASHES[7:9])
                await wait_until(lambda: holds(replica, HASHES[7:9]) and new.all_acknowledged)
                old.publish_nowait(stored=HASHES[20:30])  # a worker that thaws
                new.publish_nowait(stored=HASHES[9:10])
                await wait_until(lambda: holds(replica, HASHES[7:10]))
                position = replica.index.position("w")
                assert position is not None and position[0] == 2
                assert not old.all_acknowledged

    run(test())


def test_publish_when_the_epoch_is_an_earlier_one_then_the_stream_ends_with_invalid_argument() -> None:
    async def test() -> None:
        async with serving_index() as served, publisher(served.address, epoch=2) as new, open_channel(served.address) as channel:
            await wait_until(lambda: new.all_acknowledged)
            call = kv_index_pb2_grpc.KVIndexServiceStub(channel).Publish()
            [event] = snapshot_events(common_pb2.WorkerId(worker_id="w", epoch=1), 1, HASHES[:5])
            await call.write(kv_index_pb2.PublishRequest(event=event))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "1 is not the latest start of w" in await call.details()
            new.publish_nowait(stored=HASHES[:1])
            await wait_until(lambda: new.all_acknowledged)
            assert served.keeper.index.hashes("w") == set(HASHES[:1])

    run(test())


def test_replica_when_a_worker_leaves_then_forgets_it_at_once() -> None:
    async def test() -> None:
        async with serving_index(lease_s=60) as served, IndexReplica([served.address]) as replica:
            async with publisher(served.address) as worker:
                worker.publish_nowait(stored=HASHES[:5])
                await wait_until(lambda: holds(replica, HASHES[:5]))
            await wait_until(lambda: "w" not in replica.index)

    run(test())


def test_replica_when_a_worker_dies_then_forgets_it_after_its_lease() -> None:
    async def test() -> None:
        async with serving_index(lease_s=0.4) as served, IndexReplica([served.address]) as replica:
            async with open_channel(served.address) as channel:
                call = kv_index_pb2_grpc.KVIndexServiceStub(channel).Publish()
                worker = common_pb2.WorkerId(worker_id="w", epoch=1)
                [event] = snapshot_events(worker, 1, HASHES[:5])
                await call.write(kv_index_pb2.PublishRequest(event=event))
                await wait_until(lambda: holds(replica, HASHES[:5]))
            await wait_until(lambda: "w" not in replica.index)

    run(test())


def test_both_when_an_instance_stands_by_or_is_dead_then_find_the_one_that_serves(dead_address: str) -> None:
    async def test() -> None:
        async with serving_index(runs=False) as standby, serving_index() as served:
            addresses = [dead_address, standby.address, served.address]
            async with IndexReplica(addresses) as replica, publisher(*addresses) as worker:
                worker.publish_nowait(stored=HASHES[:5])
                await wait_until(lambda: holds(replica, HASHES[:5]))

    run(test())


class FrozenServicer(kv_index_pb2_grpc.KVIndexServiceServicer):
    """Takes streams and never says a word."""

    async def Publish(  # noqa: N802 (the proto's name)
        self, requests: Any, context: Any
    ) -> AsyncIterator[kv_index_pb2.PublishResponse]:
        await asyncio.Event().wait()
        yield kv_index_pb2.PublishResponse()

    Watch = Publish


def test_both_when_an_instance_is_frozen_then_leave_it_after_a_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_client, "SILENCE_S", 0.3)

    def register(server: grpc.aio.Server) -> None:
        kv_index_pb2_grpc.add_KVIndexServiceServicer_to_server(FrozenServicer(), server)

    async def test() -> None:
        async with MeshServer("127.0.0.1:0", register, services=[]) as frozen, serving_index() as served:
            addresses = [frozen.address, served.address]
            async with IndexReplica(addresses) as replica, publisher(*addresses) as worker:
                worker.publish_nowait(stored=HASHES[:5])
                await wait_until(lambda: holds(replica, HASHES[:5]))

    run(test())


def test_replica_when_the_service_restarts_empty_then_keeps_what_it_has_until_the_workers_have_told_again() -> None:
    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with serving_index() as served:
                replica = await stack.enter_async_context(IndexReplica([served.address]))
                worker = await stack.enter_async_context(publisher(served.address))
                gone = await stack.enter_async_context(publisher(served.address, worker_id="gone"))
                worker.publish_nowait(stored=HASHES[:5])
                gone.publish_nowait(stored=HASHES[:5])
                await wait_until(lambda: holds(replica, HASHES[:5]) and holds(replica, HASHES[:5], "gone"))
            await wait_until(lambda: not replica.synchronized)
            assert holds(replica, HASHES[:5])
            worker.publish_nowait(removed=HASHES[:1])
            await gone.__aexit__(None, None, None)
            async with serving_index(listen=served.address):
                await wait_until(lambda: holds(replica, HASHES[1:5]) and "gone" not in replica.index)
                assert replica.num_subscriptions == 2

    run(test())


def test_publisher_when_no_index_is_there_then_takes_changes_and_leaves_promptly(dead_address: str) -> None:
    async def test() -> None:
        for addresses in ([], [dead_address]):
            async with IndexReplica(addresses) as replica, publisher(*addresses) as worker:
                for _ in range(100):
                    worker.publish_nowait(stored=HASHES, removed=HASHES)
                    await asyncio.sleep(0)
                assert not replica.synchronized
                assert replica.index.match(HASHES) == []
                assert replica.silence_s is None

    async def in_time() -> None:
        async with asyncio.timeout(5):
            await test()

    run(in_time())


def test_connection_when_there_is_a_bug_then_it_is_logged_and_the_stream_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bugs: list[str] = []
    real = PrefixIndex.replace

    def buggy(self: PrefixIndex, worker_id: str, **fields: Any) -> None:
        if self is replica_index[0] and not bugs:
            bugs.append(worker_id)
            raise ZeroDivisionError("a bug")
        real(self, worker_id, **fields)

    replica_index: list[PrefixIndex] = []
    monkeypatch.setattr(PrefixIndex, "replace", buggy)

    async def test() -> None:
        async with serving_index() as served:
            replica = IndexReplica([served.address])
            replica_index.append(replica.index)
            async with replica, publisher(served.address) as worker:
                worker.publish_nowait(stored=HASHES[:5])
                await wait_until(lambda: holds(replica, HASHES[:5]))

    with caplog.at_level(logging.ERROR):
        run(test())
    assert bugs == ["w"]
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


def event(number: int, *, worker_id: str = "w", epoch: int = 1, **fields: Any) -> kv_index_pb2.BlockEvent:
    return kv_index_pb2.BlockEvent(worker=common_pb2.WorkerId(worker_id=worker_id, epoch=epoch), sequence_number=number, **fields)


PACKED = b"".join(HASHES)
GOOD_WATCH = [
    kv_index_pb2.WatchResponse(events=[event(1, snapshot=True, stored=PACKED[:32])], synchronized=True),
    kv_index_pb2.WatchResponse(events=[event(2, stored=PACKED[32:48])]),
]
BROKEN_WATCHES = {
    "no worker": [event(1, worker_id="", snapshot=True)],
    "a name without end": [event(1, worker_id="w" * 100_000, snapshot=True)],
    "a number of nothing": [event(0, snapshot=True)],
    "half a hash": [event(1, snapshot=True, stored=PACKED[:17])],
    "half a hash removed": [event(1, snapshot=True), event(2, removed=b"x")],
    "a snapshot that removes": [event(1, snapshot=True, removed=PACKED[:16])],
    "an event of a worker without a snapshot": [event(2, stored=PACKED[:16])],
    "a gap": [event(1, snapshot=True), event(3)],
    "a number that comes twice": [event(5, snapshot=True), event(5, stored=PACKED[:16])],
    "an event of another start": [event(1, snapshot=True), event(2, epoch=2, stored=PACKED[:16])],
    "more hashes than one event may have": [event(1, snapshot=True, stored=bytes(16 * (MAX_EVENT_HASHES + 1)))],
}


@pytest.mark.parametrize("name", BROKEN_WATCHES)
def test_replica_when_an_index_tells_nonsense_turns_to_the_next_stream(name: str) -> None:
    class Index(kv_index_pb2_grpc.KVIndexServiceServicer):
        num_watches = 0

        async def Watch(  # noqa: N802
            self, request: kv_index_pb2.WatchRequest, context: Any
        ) -> AsyncIterator[kv_index_pb2.WatchResponse]:
            self.num_watches += 1
            broken = [kv_index_pb2.WatchResponse(events=BROKEN_WATCHES[name], synchronized=True)]
            for response in broken if self.num_watches == 1 else GOOD_WATCH:
                yield response
            await asyncio.Event().wait()

    async def test() -> None:
        index = Index()

        def register(server: grpc.aio.Server) -> None:
            kv_index_pb2_grpc.add_KVIndexServiceServicer_to_server(index, server)

        async with (
            asyncio.timeout(20),
            MeshServer("127.0.0.1:0", register, services=[]) as server,
            IndexReplica([server.address]) as replica,
        ):
            await wait_until(lambda: holds(replica, HASHES[:3]))
            assert index.num_watches == 2 and replica.num_subscriptions == 1

    run(test())


REFUSED_EVENTS = {
    "nothing": [kv_index_pb2.BlockEvent()],
    "no worker": [event(1, worker_id="")],
    "a name without end": [event(1, worker_id="v" * 100_000)],
    "a number of nothing": [event(0, worker_id="v", snapshot=True)],
    "half a hash": [event(1, worker_id="v", snapshot=True, stored=bytes(15))],
    "a snapshot that removes": [event(1, worker_id="v", snapshot=True, removed=bytes(16))],
    "more hashes than one event may have": [event(1, worker_id="v", snapshot=True, stored=bytes(16 * (MAX_EVENT_HASHES + 1)))],
    "another worker on the same stream": [event(1, worker_id="v", snapshot=True), event(1, worker_id="u", snapshot=True)],
    "another start on the same stream": [event(1, worker_id="v", snapshot=True), event(2, worker_id="v", epoch=2)],
    "an earlier start of a worker": [event(1, epoch=0, snapshot=True)],
}
UNBELIEVED_EVENTS = {
    "a heartbeat of nobody": [event(2**64 - 1, worker_id="v")],
    "blocks before a snapshot": [event(5, worker_id="v", stored=bytes(16))],
    "a jump": [event(1, worker_id="v", snapshot=True), event(2**64 - 1, worker_id="v", stored=bytes(16))],
}


@pytest.mark.parametrize("name", [*REFUSED_EVENTS, *UNBELIEVED_EVENTS])
def test_publish_when_a_worker_tells_nonsense_is_refused_or_asked_again_and_the_others_go_on(name: str) -> None:
    async def test() -> None:
        async with (
            asyncio.timeout(20),
            serving_index() as served,
            publisher(served.address) as worker,
            open_channel(served.address) as channel,
        ):
            worker.publish_nowait(stored=HASHES[:10])
            await worker.wait_acknowledged()
            call: Any = kv_index_pb2_grpc.KVIndexServiceStub(channel).Publish()
            with contextlib.suppress(asyncio.InvalidStateError):  # it was refused before all was said
                for told in REFUSED_EVENTS.get(name) or UNBELIEVED_EVENTS[name]:
                    await call.write(kv_index_pb2.PublishRequest(event=told))
            if name in REFUSED_EVENTS:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    while await call.read() is not grpc.aio.EOF:
                        pass
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            else:
                while not (await call.read()).need_snapshot:
                    pass
            call.cancel()
            worker.publish_nowait(stored=HASHES[10:11])
            await worker.wait_acknowledged()
            index = served.keeper.index
            assert index.hashes("w") == set(HASHES[:11])
            assert index.hashes("v") == index.hashes("u") == set()

    run(test())
