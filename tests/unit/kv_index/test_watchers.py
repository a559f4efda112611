"""Feeds of replicas: whole, in order, bounded."""

import asyncio
import itertools
import random

import pytest

from protos.baton.v1 import common_pb2, kv_index_pb2
from services.core.errors import ResourceExhausted, Unavailable
from services.core.prefix_index import PrefixIndex
from services.kv_index.state import IndexState, Verdict
from services.kv_index.watchers import RESPONSE_BYTES, Watchers
from services.mesh.block_events import MAX_EVENT_HASHES, change_from_proto, snapshot_events

BUFFER_BYTES = 1 << 20


class Service:
    """State and feeds, told one event after the other."""

    def __init__(self) -> None:
        self.state = IndexState(lease_ticks=1)
        self.watchers = Watchers(buffer_bytes=BUFFER_BYTES)

    def publish(self, event: kv_index_pb2.BlockEvent) -> None:
        assert self.state.offer(change_from_proto(event)) is Verdict.APPLIED
        self.watchers.broadcast(event)

    def snapshot(self, number: int, num_hashes: int) -> None:
        for event in snapshot_events(worker(number), self.position(number) + 1, hashes(number, num_hashes)):
            self.publish(event)

    def change(self, number: int, *, stored: bytes = b"", removed: bytes = b"") -> None:
        at = self.position(number) + 1
        self.publish(kv_index_pb2.BlockEvent(worker=worker(number), sequence_number=at, stored=stored, removed=removed))

    def leave(self, number: int) -> None:
        self.publish(kv_index_pb2.BlockEvent(worker=worker(number), sequence_number=self.position(number) + 1, gone=True))

    def position(self, number: int) -> int:
        return (self.state.index.position(f"w{number}") or (1, 0))[1]


class Replica:
    """What a router makes of its feed."""

    def __init__(self) -> None:
        self.index = PrefixIndex()

    def hear(self, response: kv_index_pb2.WatchResponse) -> None:
        for change in map(change_from_proto, response.events):
            if change.gone:
                self.index.forget(change.worker_id)
            elif change.snapshot:
                self.index.replace(change.worker_id, epoch=change.epoch, sequence_number=change.sequence_number, hashes=change.stored)
            else:
                assert self.index.apply(
                    change.worker_id,
                    epoch=change.epoch,
                    sequence_number=change.sequence_number,
                    stored=change.stored,
                    removed=change.removed,
                ), f"a gap before {change.sequence_number} of {change.worker_id}"


def worker(number: int) -> common_pb2.WorkerId:
    return common_pb2.WorkerId(worker_id=f"w{number}", epoch=1)


def hashes(number: int, count: int) -> list[bytes]:
    return [number.to_bytes(8, "big") + block.to_bytes(8, "big") for block in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_feed_when_everything_changes_between_its_responses_then_the_replica_ends_equal(seed: int) -> None:
    chance = random.Random(seed)
    numbers = list(range(60))

    async def test() -> None:
        service, replica = Service(), Replica()
        for number in numbers:
            service.snapshot(number, chance.choice([0, 10, 2000, 3 * MAX_EVENT_HASHES]))

        def stir() -> None:
            for number in chance.sample(numbers, 10):
                match chance.choice(["store", "remove", "snapshot", "leave"]) if service.position(number) else "snapshot":
                    case "store":
                        service.change(number, stored=hashes(number, 9)[chance.randrange(9)])
                    case "remove":
                        service.change(number, removed=hashes(number, 1)[0])
                    case "snapshot":
                        service.snapshot(number, chance.choice([0, 10, 10, MAX_EVENT_HASHES + 1]))
                    case "leave":
                        service.leave(number)
            if chance.random() < 0.2:
                numbers.append(len(numbers))
                service.snapshot(numbers[-1], 10)

        num_responses = 0
        is_last_said = is_synchronized = False
        async for response in service.watchers.add(service.state).responses():
            assert response.ByteSize() < 2 * RESPONSE_BYTES
            replica.hear(response)
            num_responses += 1
            is_synchronized |= response.synchronized
            if is_synchronized and "last" in replica.index:
                break
            if num_responses < 100:
                stir()
            elif not is_last_said:
                is_last_said = True
                last = common_pb2.WorkerId(worker_id="last", epoch=1)
                service.publish(kv_index_pb2.BlockEvent(worker=last, sequence_number=1, snapshot=True))
        held = {worker_id: set(service.state.index.hashes(worker_id)) for worker_id in service.state.index.worker_ids if worker_id}
        assert {worker_id: set(replica.index.hashes(worker_id)) for worker_id in replica.index.worker_ids if worker_id} == held
        assert len(held) > 10

    asyncio.run(test())


@pytest.mark.parametrize("num_heard", range(5))
def test_feed_when_a_worker_comes_while_the_last_snapshots_are_sent_then_it_is_told_too(num_heard: int) -> None:
    """Its first worker fills two responses and has an event queued meanwhile, which makes a third."""

    async def test() -> None:
        service, replica = Service(), Replica()
        service.snapshot(0, 2 * RESPONSE_BYTES // 16)
        feed = service.watchers.add(service.state).responses()
        is_synchronized = False
        for number in itertools.count():
            if number == 1:
                service.change(0, removed=hashes(0, 1)[0])
            if number == num_heard:
                service.snapshot(1, 1)
            if is_synchronized and "w1" in replica.index:
                break
            response = await anext(feed)
            replica.hear(response)
            is_synchronized |= response.synchronized
            assert number < 8, "the second worker was never told"

    asyncio.run(test())


def test_feed_when_its_reader_is_too_slow_then_it_is_cut_off_and_others_go_on() -> None:
    async def test() -> None:
        service = Service()
        slow, fast = service.watchers.add(service.state), service.watchers.add(service.state)
        feeds = slow.responses(), fast.responses()
        for responses in feeds:
            assert (await anext(responses)).synchronized
        service.snapshot(0, 0)
        for number in range(2 * BUFFER_BYTES // (16 * MAX_EVENT_HASHES)):
            service.change(0, stored=b"".join(hashes(number, MAX_EVENT_HASHES)))
            assert (await anext(feeds[1])).events
        with pytest.raises(ResourceExhausted, match="behind") as caught:
            await anext(feeds[0])
        assert caught.value.retry_after_s < 1
        assert slow._num_bytes == 0  # it holds no memory, however long it goes on not reading

    asyncio.run(test())


def test_feed_when_nothing_happens_then_a_heartbeat_comes_within_half_a_second() -> None:
    async def test() -> None:
        responses = Service().watchers
        feed = responses.add(IndexState(lease_ticks=1)).responses()
        assert (await anext(feed)).synchronized
        async with asyncio.timeout(0.5):
            heartbeat = await anext(feed)
        assert not heartbeat.events and not heartbeat.synchronized

    asyncio.run(test())


def test_feed_when_the_instance_stands_by_then_it_ends_with_that_error() -> None:
    async def test() -> None:
        service = Service()
        feed = service.watchers.add(service.state).responses()
        assert (await anext(feed)).synchronized
        service.watchers.end_all(Unavailable("another one serves"))
        with pytest.raises(Unavailable, match="another one serves"):
            await anext(feed)

    asyncio.run(test())


def test_feed_when_its_reader_has_left_then_it_is_told_nothing() -> None:
    service = Service()
    watcher = service.watchers.add(service.state)
    service.snapshot(0, 0)
    service.watchers.remove(watcher)
    service.change(0, stored=hashes(0, 1)[0])
    assert not watcher._events
