"""Blocks on their way from pool to pool, over each transport: exact, only where they were granted, and counted."""

import asyncio
import contextlib
import random
import threading

import pytest

from services.core.errors import ChecksumMismatch, PeerUnavailable, TransferFenced
from services.mesh.kv_transport import TRANSPORTS, IncomingTransfer, KVMemory, KVReceiver, KVSender, OutgoingTransfer
from services.mesh.kv_wire import Frame, FrameKind, block_checksum
from tests.unit.mesh.kv_peers import (
    BLOCK_BYTES,
    LAYOUT,
    RawReceiver,
    RawSender,
    assert_only_changed,
    block_bytes,
    filled_memory,
    run,
    wait_until,
)


async def send(outgoing: OutgoingTransfer, incoming: IncomingTransfer, pairs: list[tuple[int, int]]) -> None:
    """A chunk, with what the two workers do over grpc."""
    for block in await outgoing.send(pairs):
        incoming.land_inline(block.index, block.data, block.checksum)


@pytest.mark.parametrize("on_uvloop", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_transfer_when_sent_in_chunks_out_of_order_lands_exactly_where_granted(transport: str, on_uvloop: bool) -> None:
    async def main() -> None:
        with filled_memory(20, 1) as source, filled_memory(32, 2) as target:
            before = bytes(target.buffer)
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT, transports=[transport]) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT) as sender,
            ):
                incoming = receiver.grant([9, 30, 0, 31, 4, 17, 5])
                outgoing = await sender.open(incoming.transfer_id, receiver.endpoint, incoming.block_ids)
                assert outgoing.transport == transport
                for index, block_id in [(1, 19), (0, 3)]:
                    await send(outgoing, incoming, [(index, block_id)])
                await wait_until(lambda: incoming.num_landed == 2)
                assert incoming.num_landed_leading == 2 and incoming.bytes_landed == 2 * BLOCK_BYTES
                await send(outgoing, incoming, [(6, 0), (3, 7), (4, 8)])
                await wait_until(lambda: incoming.num_landed == 5)
                assert incoming.num_landed_leading == 2 and not incoming.is_fenced
                await send(outgoing, incoming, [])
                await send(outgoing, incoming, [(5, 12), (2, 11)])
                await outgoing.finish()
                await incoming.wait_landed()
                assert incoming.num_landed == incoming.num_landed_leading == 7
                sent = dict(zip(incoming.block_ids, [3, 19, 11, 7, 8, 12, 0], strict=True))
                for target_id, source_id in sent.items():
                    assert block_bytes(target, target_id) == block_bytes(source, source_id)
                assert_only_changed(target, before, set(sent))
                assert receiver.blocks_landed == sender.blocks_sent == {transport: 7}
                assert await incoming.fence(0)

    run(main, on_uvloop=on_uvloop)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_transfers_when_there_are_many_share_one_connection(transport: str) -> None:
    async def main() -> None:
        with filled_memory(40, 1, block_bytes=4096) as source, KVMemory([(40, 4096)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT, transports=[transport]) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT) as sender,
            ):

                async def transfer(number: int) -> None:
                    incoming = receiver.grant(range(4 * number, 4 * number + 4))
                    outgoing = await sender.open(incoming.transfer_id, receiver.endpoint, incoming.block_ids)
                    await outgoing.send([(index, 4 * number + index) for index in range(4)])
                    await outgoing.finish()
                    await incoming.wait_landed()

                await asyncio.gather(*(transfer(number) for number in range(10)))
                assert target.buffer == source.buffer
                assert sum(thread.name.startswith(f"kv-receive-{transport}") for thread in threading.enumerate()) == 1

    run(main)


def test_short_transfer_when_it_comes_after_a_long_one_does_not_wait_for_its_end() -> None:
    async def main() -> None:
        with filled_memory(64, 1, block_bytes=1 << 20) as source, RawReceiver(block_bytes=1 << 20) as receiver:
            async with KVSender(source, layout_fingerprint=LAYOUT) as sender, asyncio.TaskGroup() as tasks:
                openings = [tasks.create_task(sender.open(name * 16, receiver.endpoint, range(60))) for name in (b"L", b"S")]
                await receiver.welcome()
                await receiver.accept_open()
                await receiver.accept_open()
                long, short = await asyncio.gather(*openings)
                sends = [tasks.create_task(long.send([(index, index) for index in range(60)]))]
                await asyncio.sleep(0)
                sends.append(tasks.create_task(short.send([(0, 0), (1, 1)])))
                await asyncio.sleep(0)
                order = [(await receiver.hear())[0].transfer_id[:1] for _ in range(62)]
                assert order.count(b"S") == 2
                # What the socket's buffers took before the short one was there goes first, and no more.
                assert order.index(b"S") < 30 and order.index(b"S", order.index(b"S") + 1) < 40
                await asyncio.gather(*sends)

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_block_when_its_bytes_differ_from_its_checksum_fails_its_transfer_alone(transport: str) -> None:
    async def main() -> None:
        with KVMemory([(4, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                with await RawSender.join(receiver.endpoint, transport) as peer:
                    spoilt, whole = receiver.grant([0, 1]), receiver.grant([2])
                    for transfer in (spoilt, whole):
                        answer = await peer.open(transfer.transfer_id)
                        assert answer == Frame(FrameKind.OPENED, transfer.transfer_id)
                    data = bytes(BLOCK_BYTES)
                    flipped = b"\1" + data[1:]
                    payload = data if transport == "tcp" else b""
                    peer.say(Frame(FrameKind.BLOCK, spoilt.transfer_id, 0, BLOCK_BYTES, block_checksum(flipped)), payload)
                    with pytest.raises(ChecksumMismatch):
                        await spoilt.wait_landed()
                    assert spoilt.num_landed == 0
                    peer.say(Frame(FrameKind.BLOCK, whole.transfer_id, 0, BLOCK_BYTES, block_checksum(data)), payload)
                    await whole.wait_landed()
                    if transport == "shm":
                        assert not await spoilt.fence(0.01)  # the peer may still write; this one does not answer
                        peer.say(Frame(FrameKind.STOPPED, spoilt.transfer_id))
                    assert await spoilt.fence(5)
                    with pytest.raises(ChecksumMismatch):
                        await spoilt.wait_landed()

    run(main)


def test_inline_block_when_its_bytes_differ_from_its_checksum_is_not_written() -> None:
    async def main() -> None:
        with filled_memory(2, 1) as target:
            before = bytes(target.buffer)
            async with KVReceiver(target, layout_fingerprint=LAYOUT, transports=["grpc"]) as receiver:
                transfer = receiver.grant([1])
                with pytest.raises(ChecksumMismatch):
                    transfer.land_inline(0, bytes(BLOCK_BYTES), 1)
                with pytest.raises(ChecksumMismatch):
                    await transfer.wait_landed()
                with pytest.raises(ChecksumMismatch):  # nothing more is taken
                    transfer.land_inline(0, bytes(BLOCK_BYTES), block_checksum(bytes(BLOCK_BYTES)))
                assert bytes(target.buffer) == before
                assert await transfer.fence(0)

    run(main)


@pytest.mark.parametrize(("index", "num_bytes"), [(2, BLOCK_BYTES), (0, BLOCK_BYTES - 1), (0, BLOCK_BYTES + 1), (1, BLOCK_BYTES)])
def test_inline_block_when_it_breaks_the_protocol_ends_the_transfer(index: int, num_bytes: int) -> None:
    async def main() -> None:
        with filled_memory(3, 1) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                transfer = receiver.grant([0, 1])
                data = bytes(BLOCK_BYTES)
                transfer.land_inline(1, data, block_checksum(data))
                before = bytes(target.buffer)
                with pytest.raises(PeerUnavailable, match="broke the protocol"):
                    transfer.land_inline(index, bytes(num_bytes), block_checksum(bytes(num_bytes)))
                assert bytes(target.buffer) == before
                assert transfer.is_fenced

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_inline_block_when_a_connection_carries_the_transfer_ends_it(transport: str) -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                with await RawSender.join(receiver.endpoint, transport) as peer:
                    transfer = receiver.grant([0])
                    await peer.open(transfer.transfer_id)
                    data = b"\1" * BLOCK_BYTES
                    with pytest.raises(PeerUnavailable, match="broke the protocol"):
                        transfer.land_inline(0, data, block_checksum(data))
                    assert not any(target.block(0))
                    assert transfer.is_fenced == (transport == "tcp")  # over shm the peer may be writing still

    run(main)


def test_checksums_when_switched_off_let_any_bytes_land() -> None:
    async def main() -> None:
        with filled_memory(4, 1) as source, KVMemory([(4, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT, checksum=False) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT, checksum=False) as sender,
            ):
                incoming = receiver.grant([0, 1, 2, 3])
                outgoing = await sender.open(incoming.transfer_id, receiver.endpoint, incoming.block_ids)
                await outgoing.send([(index, index) for index in range(4)])
                await incoming.wait_landed()
                assert target.buffer == source.buffer

    run(main)


def test_grant_when_a_block_is_granted_already_or_does_not_exist_is_refused() -> None:
    async def main() -> None:
        with KVMemory([(4, 4096)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                first = receiver.grant([0, 1])
                for block_ids in ([1, 2], [4], [-1], [2, 2], []):
                    with pytest.raises(AssertionError):
                        receiver.grant(block_ids)
                await first.fence(0)
                receiver.grant([1, 2])

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("seed", range(4))
def test_transfers_when_cancelled_at_random_never_touch_a_foreign_block(transport: str, seed: int) -> None:
    """Eight requests at a time share a pool that has room for few more; a fenced one's blocks are taken by the next at once.

    A late write would land in a block that another transfer has filled, or that nobody has been given: both are compared at the end.
    """
    dice = random.Random(seed)
    num_blocks, num_requests, block_size = 48, 60, 32 << 10

    async def main() -> None:
        with (
            filled_memory(64, seed, block_bytes=block_size) as source,
            filled_memory(num_blocks, seed + 1, block_bytes=block_size) as target,
        ):
            expected = {block_id: block_bytes(target, block_id) for block_id in range(num_blocks)}
            free = set(range(num_blocks))
            outcomes = {"landed": 0, "fenced": 0}
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT, transports=[transport]) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT) as sender,
            ):

                async def prefill(incoming: IncomingTransfer, source_ids: list[int]) -> None:
                    outgoing = await sender.open(incoming.transfer_id, receiver.endpoint, incoming.block_ids)
                    try:
                        pairs = list(enumerate(source_ids))
                        dice.shuffle(pairs)
                        while pairs:
                            chunk, pairs = pairs[:3], pairs[3:]
                            await outgoing.send(chunk)
                            await asyncio.sleep(dice.choice([0, 0, 0.0005]))
                        await outgoing.finish()
                    finally:
                        await outgoing.stop(5)

                async def request() -> None:
                    block_ids = dice.sample(sorted(free), dice.randint(1, 6))
                    free.difference_update(block_ids)
                    source_ids = [dice.randrange(64) for _ in block_ids]
                    incoming = receiver.grant(block_ids)
                    prefilling = asyncio.create_task(prefill(incoming, source_ids))
                    try:
                        async with asyncio.timeout(dice.choice([0.0, 0.0005, 0.001, 0.002, None])):
                            await incoming.wait_landed()
                        outcomes["landed"] += 1
                        for block_id, source_id in zip(block_ids, source_ids, strict=True):
                            expected[block_id] = block_bytes(source, source_id)
                            assert block_bytes(target, block_id) == expected[block_id]
                    except TimeoutError:
                        if dice.random() < 0.5:
                            prefilling.cancel()  # the call's end may come before the fence or after it
                        assert await incoming.fence(5)
                        outcomes["fenced"] += 1
                        for block_id in block_ids:
                            expected[block_id] = block_bytes(target, block_id)
                    free.update(block_ids)
                    with contextlib.suppress(TransferFenced, asyncio.CancelledError):
                        await prefilling

                async def client(count: int) -> None:
                    for _ in range(count):
                        await request()

                await asyncio.gather(*(client(num_requests // 6) for _ in range(6)))
                assert min(outcomes.values()) > 0, outcomes
            for block_id, content in expected.items():
                assert block_bytes(target, block_id) == content

    run(main)
