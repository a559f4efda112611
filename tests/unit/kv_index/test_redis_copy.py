"""The index in a real Redis: one owner, whole batches, leases on everything, and nothing believed that is incomplete."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from services.kv_index.journal import Batch
from services.kv_index.redis_copy import Outcome, RedisCopy, StoredWorker
from services.mesh.redis_server import RedisServer
from services.mesh.redis_store import RedisStore, Script, ScriptCall

HASHES = [number.to_bytes(16, "big") for number in range(40_000)]
BLOCKS = "baton:{test}:index:blocks:w"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def run(server: RedisServer, test: Callable[[RedisStore], Awaitable[None]]) -> None:
    async def with_store() -> None:
        async with RedisStore(server.url) as store:
            await command(store, "return redis.call('FLUSHALL')")
            await test(store)

    asyncio.run(with_store())


async def command(store: RedisStore, text: str, *args: bytes) -> object:
    [answer] = await store.run([ScriptCall(script=Script(text), keys=[], args=args)])
    return answer


def copy_of(store: RedisStore, instance: str = "a", *, lease_s: float = 10, owner_lease_s: float = 10) -> RedisCopy:
    return RedisCopy(store, instance=instance, namespace="test", lease_s=lease_s, owner_lease_s=owner_lease_s)


async def owner_of(store: RedisStore) -> RedisCopy:
    copy = copy_of(store)
    assert (await copy.own(may_take=True)).ours
    return copy


def snapshot(number: int, hashes: list[bytes], epoch: int = 1) -> Batch:
    return Batch(worker_id="w", epoch=epoch, follows=None, sequence_number=number, stored=set(hashes))


def delta(follows: int, number: int, *, stored: list[bytes], removed: list[bytes], epoch: int = 1) -> Batch:
    return Batch(worker_id="w", epoch=epoch, follows=follows, sequence_number=number, stored=set(stored), removed=set(removed))


async def loaded(copy: RedisCopy) -> list[StoredWorker]:
    return [worker async for worker in copy.load()]


def stored(number: int, hashes: list[bytes], epoch: int = 1) -> list[StoredWorker]:
    return [StoredWorker(worker_id="w", epoch=epoch, sequence_number=number, hashes=set(hashes))]


def test_own_when_another_has_the_index_then_says_for_how_long_and_takes_it_after_a_release(server: RedisServer) -> None:
    async def test(store: RedisStore) -> None:
        first, second = copy_of(store, "a"), copy_of(store, "b")
        assert not (nobody := await second.own(may_take=False)).ours and nobody.lapses_in_s is None
        assert (await first.own(may_take=True)).ours
        assert (await first.own(may_take=False)).ours
        waits = await second.own(may_take=True)
        assert not waits.ours and waits.lapses_in_s is not None and 9 < waits.lapses_in_s <= 10
        await second.release()
        assert not (await second.own(may_take=True)).ours
        await first.release()
        assert (await second.own(may_take=True)).ours

    run(server, test)


def test_own_when_an_earlier_start_of_the_same_instance_has_it_then_takes_it_but_never_back_again(server: RedisServer) -> None:
    async def test(store: RedisStore) -> None:
        old, new = copy_of(store, "a"), copy_of(store, "a")
        assert (await old.own(may_take=True)).ours
        assert (await new.own(may_take=False)).ours
        assert not (await old.own(may_take=True)).ours
        assert (await new.own(may_take=False)).ours
        assert not (await copy_of(store, "a longer name").own(may_take=True)).ours

    run(server, test)


def test_write_when_batches_follow_then_load_gives_their_sum(server: RedisServer) -> None:
    async def test(store: RedisStore) -> None:
        copy = await owner_of(store)
        batches = [snapshot(1, HASHES[:10]), delta(1, 4, stored=HASHES[20:30], removed=HASHES[:5])]
        assert await copy.write(batches) == [Outcome.WRITTEN] * 2
        assert await loaded(copy) == stored(4, HASHES[5:10] + HASHES[20:30])
        assert await copy.write([snapshot(1, HASHES[:2], epoch=2)]) == [Outcome.WRITTEN]
        assert await loaded(copy) == stored(1, HASHES[:2], epoch=2)

    run(server, test)


@pytest.mark.parametrize("wrong", [delta(2, 3, stored=HASHES[5:6], removed=[]), delta(1, 2, stored=[], removed=HASHES, epoch=2)])
def test_write_when_a_batch_does_not_follow_then_it_is_refused_and_changes_nothing(server: RedisServer, wrong: Batch) -> None:
    async def test(store: RedisStore) -> None:
        copy = await owner_of(store)
        await copy.write([snapshot(1, HASHES[:3])])
        assert await copy.write([wrong]) == [Outcome.REFUSED]
        assert await loaded(copy) == stored(1, HASHES[:3])

    run(server, test)


@pytest.mark.parametrize("loss", [f"return redis.call('DEL', '{BLOCKS}')", f"return redis.call('SPOP', '{BLOCKS}')"])
def test_write_when_redis_lost_a_part_then_it_is_refused_and_load_leaves_the_worker_out(server: RedisServer, loss: str) -> None:
    async def test(store: RedisStore) -> None:
        copy = await owner_of(store)
        await copy.write([snapshot(1, HASHES[:3])])
        await command(store, loss)
        assert await loaded(copy) == []
        assert await copy.write([delta(1, 1, stored=[], removed=[])]) == [Outcome.REFUSED]
        assert await copy.write([snapshot(2, HASHES[:3])]) == [Outcome.WRITTEN]
        assert await loaded(copy) == stored(2, HASHES[:3])

    run(server, test)


def test_write_when_a_batch_is_big_then_all_of_it_or_a_refusal_comes_through(server: RedisServer) -> None:
    async def test(store: RedisStore) -> None:
        copy = await owner_of(store)
        big = delta(9, 10, stored=HASHES[20_000:], removed=HASHES[:19_999])
        assert await copy.write([big]) == [Outcome.REFUSED]
        assert await copy.write([snapshot(9, HASHES[:20_000]), big]) == [Outcome.WRITTEN] * 2
        assert await loaded(copy) == stored(10, HASHES[19_999:])

    run(server, test)


def test_load_when_a_big_batch_was_cut_short_then_leaves_the_worker_out(server: RedisServer) -> None:
    async def test(store: RedisStore) -> None:
        copy = await owner_of(store)
        pieces = list(copy._calls(snapshot(10, HASHES)))
        assert len(pieces) == 3
        await store.run(pieces[:2])
        assert await loaded(copy) == []
        assert await copy.write([delta(10, 10, stored=[], removed=[])]) == [Outcome.REFUSED]
        await store.run(pieces[2:])
        assert await loaded(copy) == stored(10, HASHES)

    run(server, test)


def test_write_when_another_instance_owns_the_index_then_nothing_is_written(server: RedisServer) -> None:
    async def test(store: RedisStore) -> None:
        copy = await owner_of(store)
        await copy.write([snapshot(1, HASHES[:3])])
        thawed = copy_of(store, "b")
        gone = Batch(worker_id="w", epoch=1, follows=None, sequence_number=0, gone=True)
        assert await thawed.write([snapshot(5, HASHES[:9]), delta(1, 2, stored=HASHES[4:5], removed=[]), gone]) == [Outcome.NOT_OWNER] * 3
        assert await loaded(copy) == stored(1, HASHES[:3])

    run(server, test)


def test_write_when_a_worker_is_gone_then_nothing_is_left_of_it(server: RedisServer) -> None:
    async def test(store: RedisStore) -> None:
        copy = await owner_of(store)
        await copy.write([snapshot(1, HASHES[:3]), Batch(worker_id="w", epoch=1, follows=None, sequence_number=0, gone=True)])
        assert await command(store, "return redis.call('KEYS', '*')") == [b"baton:{test}:index:owner"]

    run(server, test)


def test_leases_when_anything_is_written_then_every_key_has_one(server: RedisServer) -> None:
    async def test(store: RedisStore) -> None:
        copy = await owner_of(store)
        await copy.write([snapshot(1, HASHES[:3])])
        keys = await command(store, "return redis.call('KEYS', '*')")
        assert isinstance(keys, list) and len(keys) == 3
        for key in keys:
            lease_ms = await command(store, "return redis.call('PTTL', ARGV[1])", key)
            assert isinstance(lease_ms, int) and 5_000 < lease_ms <= 10_000

    run(server, test)


@pytest.mark.parametrize(
    "record",
    [
        *[b"", b"x", b"1:2", b"1:2 ", b"1:2:3 2", b"a:b 2", b"-1:2 2", b"1:2 2 2", b"1:2 -2", "١:٢ ٢".encode(), b"1:2 " + b"9" * 5000],
        b"18446744073709551616:2 2",  # more than a message has room for
        b"1:18446744073709551616 2",
        b"1:0 2",  # no event has stored them
    ],
)
def test_load_when_a_workers_record_is_not_ours_leaves_it_out_and_takes_the_others(server: RedisServer, record: bytes) -> None:
    async def test(store: RedisStore) -> None:
        copy = await owner_of(store)
        other = Batch(worker_id="v", epoch=1, follows=None, sequence_number=1, stored=set(HASHES[:3]))
        await copy.write([snapshot(7, HASHES[:2]), other])
        await command(store, "return redis.call('HSET', 'baton:{test}:index:workers', 'w', ARGV[1])", record)
        await command(store, "return redis.call('HSET', 'baton:{test}:index:workers', ARGV[1], '1:1 0')", b"\xff\xfe")
        assert [worker.worker_id for worker in await loaded(copy)] == ["v"]
        assert await copy.write([snapshot(8, HASHES[:2])]) == [Outcome.WRITTEN]
        assert stored(8, HASHES[:2])[0] in await loaded(copy)

    run(server, test)


def test_load_when_a_worker_has_more_blocks_than_its_events_can_have_stored_leaves_it_out(server: RedisServer) -> None:
    """The bug that this keeps away ended the service: such a worker's snapshot has no first number."""

    async def test(store: RedisStore) -> None:
        copy = await owner_of(store)
        await copy.write([snapshot(1, HASHES[:5000])])
        assert await loaded(copy) == []
        await copy.write([snapshot(2, HASHES[:5000])])
        assert await loaded(copy) == stored(2, HASHES[:5000])

    run(server, test)


@pytest.mark.parametrize("spoil", ["'SET', KEY, 'x'", "'SADD', KEY, 'short'", "'HSET', KEY, 'a', 'b'"])
def test_load_when_a_workers_blocks_are_no_hashes_leaves_it_out_until_its_next_snapshot(server: RedisServer, spoil: str) -> None:
    async def test(store: RedisStore) -> None:
        copy = await owner_of(store)
        await copy.write([snapshot(1, [])])
        await command(store, f"return redis.call({spoil.replace('KEY', repr(BLOCKS))})")
        assert [worker.hashes for worker in await loaded(copy) if worker.hashes] == []
        assert await copy.write([snapshot(2, HASHES[:2])]) == [Outcome.WRITTEN]
        assert await loaded(copy) == stored(2, HASHES[:2])

    run(server, test)


def test_own_when_somebody_left_an_owner_without_a_lease_takes_the_index(server: RedisServer) -> None:
    """No instance does so; whoever did will not come back to give it up."""

    async def test(store: RedisStore) -> None:
        await command(store, "return redis.call('SET', 'baton:{test}:index:owner', 'junk')")
        assert (await copy_of(store).own(may_take=True)).ours
        assert not (await copy_of(store, "b").own(may_take=True)).ours

    run(server, test)
