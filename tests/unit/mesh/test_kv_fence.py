"""Ending a transfer, by either side and in every state: after the fence no byte of it is written, and nobody else is disturbed."""

import asyncio
import contextlib

import pytest

from services.core.errors import PeerUnavailable, TransferFenced
from services.mesh.kv_transport import IncomingTransfer, KVMemory, KVReceiver, KVSender
from services.mesh.kv_wire import Frame, FrameKind, Refusal, block_checksum
from tests.unit.mesh.kv_peers import BLOCK_BYTES, LAYOUT, RawReceiver, RawSender, block_bytes, filled_memory, run, wait_until

BLOCK = bytes(range(256)) * (BLOCK_BYTES // 256)
REFUSED = Frame(FrameKind.REFUSED, refusal=Refusal.NO_SUCH_GRANT)


def block_frame(transfer: IncomingTransfer, index: int) -> Frame:
    return Frame(FrameKind.BLOCK, transfer.transfer_id, index, BLOCK_BYTES, block_checksum(BLOCK))


async def hear_stop(peer: RawSender, transfer: IncomingTransfer) -> None:
    assert await peer.hear() == Frame(FrameKind.STOP, transfer.transfer_id)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_fence_when_nobody_has_opened_it_is_immediate_and_later_opens_are_refused(transport: str) -> None:
    async def main() -> None:
        with KVMemory([(4, BLOCK_BYTES)]) as target, KVMemory([(4, BLOCK_BYTES)]) as source:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT, transports=[transport]) as sender,
            ):
                transfer = receiver.grant([0])
                assert not transfer.is_fenced
                assert await transfer.fence(0)
                with pytest.raises(TransferFenced):
                    await transfer.wait_landed()
                with pytest.raises(TransferFenced):
                    await sender.open(transfer.transfer_id, receiver.endpoint, transfer.block_ids)
                with await RawSender.join(receiver.endpoint, transport) as peer:
                    assert await peer.open(transfer.transfer_id) == REFUSED._replace(transfer_id=transfer.transfer_id)

    run(main)


def test_fence_when_blocks_came_inline_is_immediate_and_later_ones_are_refused() -> None:
    async def main() -> None:
        with KVMemory([(4, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                transfer = receiver.grant([0, 1])
                transfer.land_inline(0, BLOCK, block_checksum(BLOCK))
                assert await transfer.fence(0)
                with pytest.raises(TransferFenced):
                    transfer.land_inline(1, BLOCK, block_checksum(BLOCK))
                assert not any(target.block(1))

    run(main)


def test_tcp_fence_when_the_sender_stalls_inside_a_block_ends_its_connection() -> None:
    async def main() -> None:
        with KVMemory([(4, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, transports=["tcp"]) as receiver:
                with await RawSender.join(receiver.endpoint, "tcp") as peer, await RawSender.join(receiver.endpoint, "tcp") as other:
                    stalled, neighbour, elsewhere, unopened = (receiver.grant([block_id]) for block_id in range(4))
                    await peer.open(stalled.transfer_id)
                    await peer.open(neighbour.transfer_id)
                    await other.open(elsewhere.transfer_id)
                    peer.say(block_frame(stalled, 0), BLOCK[:1000])
                    await wait_until(lambda: any(target.block(0)))
                    assert await stalled.fence(0.02)
                    with pytest.raises(TransferFenced):
                        await stalled.wait_landed()
                    with pytest.raises(PeerUnavailable):
                        await neighbour.wait_landed()
                    assert neighbour.is_fenced
                    assert await peer.hear() is None
                    assert not elsewhere.is_fenced and not unopened.is_fenced
                    other.say(block_frame(elsewhere, 0), BLOCK)
                    await elsewhere.wait_landed()
                    assert bytes(target.block(0)) == BLOCK[:1000] + bytes(BLOCK_BYTES - 1000)

    run(main)


def test_tcp_fence_when_the_block_on_its_way_arrives_in_time_keeps_the_connection() -> None:
    async def main() -> None:
        with KVMemory([(4, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, transports=["tcp"]) as receiver:
                with await RawSender.join(receiver.endpoint, "tcp") as peer:
                    fenced, neighbour = receiver.grant([0, 1]), receiver.grant([2])
                    await peer.open(fenced.transfer_id)
                    await peer.open(neighbour.transfer_id)
                    peer.say(block_frame(fenced, 0), BLOCK[:1000])
                    await wait_until(lambda: any(target.block(0)))
                    async with asyncio.TaskGroup() as tasks:
                        fencing = tasks.create_task(fenced.fence(10))
                        await wait_until(lambda: fenced._error is not None)
                        assert not fenced.is_fenced and not fencing.done()
                        peer.sock.sendall(BLOCK[1000:])
                        assert await fencing
                    assert fenced.num_landed == 0
                    # What comes for it now is read past.
                    peer.say(block_frame(fenced, 1), BLOCK)
                    peer.say(block_frame(neighbour, 0), BLOCK)
                    await neighbour.wait_landed()
                    assert not any(target.block(1))
                    assert bytes(target.block(2)) == BLOCK

    run(main)


def test_shm_fence_when_the_sender_lives_is_acknowledged_and_ends_its_sending() -> None:
    async def main() -> None:
        with filled_memory(4, 1) as source, KVMemory([(4, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT, transports=["shm"]) as sender,
            ):
                incoming, neighbour = receiver.grant([0, 1]), receiver.grant([2])
                outgoing = await sender.open(incoming.transfer_id, receiver.endpoint, incoming.block_ids)
                beside = await sender.open(neighbour.transfer_id, receiver.endpoint, neighbour.block_ids)
                await outgoing.send([(0, 0)])
                await wait_until(lambda: incoming.num_landed == 1)
                assert await incoming.fence(10)
                for act in (outgoing.send([(1, 1)]), outgoing.finish(), incoming.wait_landed()):
                    with pytest.raises(TransferFenced):
                        await act
                await outgoing.stop(0)
                await beside.send([(0, 3)])
                await neighbour.wait_landed()
                assert not any(target.block(1))

    run(main)


@pytest.mark.parametrize("ends_by", ["STOPPED", "end of the connection", "breaking the protocol"])
def test_shm_fence_when_the_sender_does_not_answer_fails_until_it_is_out(ends_by: str) -> None:
    async def main() -> None:
        with KVMemory([(4, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                with await RawSender.join(receiver.endpoint, "shm") as peer:
                    transfer = receiver.grant([0])
                    await peer.open(transfer.transfer_id)
                    assert not await transfer.fence(0.02)
                    await hear_stop(peer, transfer)
                    peer.say(block_frame(transfer, 0))  # was on its way, and is not taken
                    with pytest.raises(AssertionError, match="granted to two"):
                        receiver.grant([0])
                    async with asyncio.TaskGroup() as tasks:
                        waiting = tasks.create_task(transfer.wait_fenced())
                        if ends_by == "breaking the protocol":
                            peer.say(Frame(FrameKind.WELCOME))
                            assert await peer.hear() is None  # it must go, but is still in there
                            assert not transfer.is_fenced and not waiting.done()
                        if ends_by == "STOPPED":
                            peer.say(Frame(FrameKind.STOPPED, transfer.transfer_id))
                        else:
                            peer.close()
                    assert transfer.is_fenced and transfer.num_landed == 0
                    receiver.grant([0])

    run(main)


def test_shm_fence_when_cancelled_leaves_the_transfer_ended_and_waitable() -> None:
    async def main() -> None:
        with KVMemory([(4, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                with await RawSender.join(receiver.endpoint, "shm") as peer:
                    transfer = receiver.grant([0])
                    await peer.open(transfer.transfer_id)
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.02):
                            await transfer.fence(10)
                    assert not transfer.is_fenced
                    with pytest.raises(TransferFenced):
                        await transfer.wait_landed()
                    peer.say(Frame(FrameKind.STOPPED, transfer.transfer_id))
                    await transfer.wait_fenced()

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("inside_a_block", [False, True])
def test_connection_when_it_drops_ends_the_transfers_that_used_it_and_no_others(transport: str, inside_a_block: bool) -> None:
    async def main() -> None:
        with KVMemory([(4, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                with await RawSender.join(receiver.endpoint, transport) as peer:
                    used, unused = receiver.grant([0, 1]), receiver.grant([2])
                    await peer.open(used.transfer_id)
                    if inside_a_block:
                        peer.sock.sendall(
                            block_frame(used, 0).pack()[:20] if transport == "shm" else block_frame(used, 0).pack() + BLOCK[:9]
                        )
                    peer.close()
                    with pytest.raises(PeerUnavailable):
                        await used.wait_landed()
                    await used.wait_fenced()
                    assert await used.fence(0)
                    assert not unused.is_fenced

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_receiver_when_closed_ends_both_sides_of_every_transfer(transport: str) -> None:
    async def main() -> None:
        with filled_memory(4, 1) as source, KVMemory([(4, BLOCK_BYTES)]) as target:
            async with KVSender(source, layout_fingerprint=LAYOUT) as sender:
                async with KVReceiver(target, layout_fingerprint=LAYOUT, transports=[transport]) as receiver:
                    opened, unopened = receiver.grant([0]), receiver.grant([1])
                    outgoing = await sender.open(opened.transfer_id, receiver.endpoint, opened.block_ids)
                    endpoint = receiver.endpoint
                for transfer in (opened, unopened):
                    with pytest.raises(TransferFenced):
                        await transfer.wait_landed()
                    assert transfer.is_fenced
                with pytest.raises(PeerUnavailable):  # noqa: PT012
                    while True:
                        await outgoing.send([(0, 0)])
                        await asyncio.sleep(0.001)
                with pytest.raises(PeerUnavailable):
                    await sender.open(bytes(16), endpoint, [0])

    run(main)


def test_receiver_when_closed_before_a_shm_sender_is_out_never_calls_it_fenced() -> None:
    async def main() -> None:
        with KVMemory([(4, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                peer = await RawSender.join(receiver.endpoint, "shm")
                transfer = receiver.grant([0])
                await peer.open(transfer.transfer_id)
            assert not transfer.is_fenced
            assert not await transfer.fence(0)
            peer.close()

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_sender_when_closed_ends_its_transfers_at_the_receiver(transport: str) -> None:
    async def main() -> None:
        with filled_memory(4, 1) as source, KVMemory([(4, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, transports=[transport]) as receiver:
                async with KVSender(source, layout_fingerprint=LAYOUT) as sender:
                    incoming = receiver.grant([0, 1])
                    outgoing = await sender.open(incoming.transfer_id, receiver.endpoint, incoming.block_ids)
                    await outgoing.send([(0, 0)])
                with pytest.raises(PeerUnavailable):
                    await incoming.wait_landed()
                assert await incoming.fence(5)
                assert incoming.num_landed == 1  # it was announced before the end
                with pytest.raises(PeerUnavailable):
                    await outgoing.send([(1, 1)])

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_stop_when_blocks_are_queued_reads_the_pool_no_more(transport: str) -> None:
    """The pool is overwritten the moment stop() returns: every block at the receiver is then whole, or was never written.

    On a machine that stalls this thread for the 20 ms that the whole transfer takes, nothing is left to stop, and the test is an easy one.
    """

    async def main() -> None:
        num_blocks, size = 96, 1 << 20
        with filled_memory(num_blocks, 1, block_bytes=size) as source, KVMemory([(num_blocks, size)]) as target:
            old, new = bytes(source.buffer), b"\xff" * source.pool_bytes
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT, transports=[transport]) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT) as sender,
            ):
                incoming = receiver.grant(range(num_blocks))
                outgoing = await sender.open(incoming.transfer_id, receiver.endpoint, incoming.block_ids)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(_send_all(outgoing, num_blocks))
                    await wait_until(lambda: sender.blocks_sent[transport] > 0)
                    await outgoing.stop(10)
                    source.buffer[:] = new
                for act in (outgoing.send([(0, 0)]), outgoing.finish()):
                    with pytest.raises(TransferFenced):
                        await act
                await outgoing.stop(0)
                assert await incoming.fence(10)
                zeros = bytes(size)
                for block_id in range(num_blocks):
                    assert block_bytes(target, block_id) in (zeros, old[block_id * size : (block_id + 1) * size])
                # The connection is as good as before.
                again = receiver.grant([0])
                outgoing = await sender.open(again.transfer_id, receiver.endpoint, again.block_ids)
                await outgoing.send([(0, 0)])
                await again.wait_landed()

    run(main)


async def _send_all(outgoing: object, num_blocks: int) -> bool:
    """Whether everything went out."""
    try:
        await outgoing.send([(index, index) for index in range(num_blocks)])  # type: ignore[attr-defined]
    except TransferFenced:
        return False
    return True


def test_tcp_stop_when_the_receiver_does_not_read_ends_the_connection() -> None:
    async def main() -> None:
        with filled_memory(60, 1, block_bytes=1 << 20) as source, RawReceiver(block_bytes=1 << 20) as receiver:
            async with KVSender(source, layout_fingerprint=LAYOUT) as sender, asyncio.TaskGroup() as tasks:
                opening = tasks.create_task(sender.open(b"1" * 16, receiver.endpoint, range(60)))
                await receiver.welcome()
                await receiver.accept_open()
                outgoing = await opening
                sending = tasks.create_task(_send_all(outgoing, 60))
                num_sent = -1
                while num_sent != sender.blocks_sent["tcp"] or not num_sent:  # until the lane is stuck inside a block
                    num_sent = sender.blocks_sent["tcp"]
                    await asyncio.sleep(0.1)
                await outgoing.stop(0.02)
                assert not await sending
                opening = tasks.create_task(sender.open(b"2" * 16, receiver.endpoint, range(60)))
                await receiver.welcome()  # a new connection, since that one could not be used any more
                await receiver.accept_open()
                await opening

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_send_when_cancelled_ends_its_transfer_alone(transport: str) -> None:
    async def main() -> None:
        with filled_memory(64, 1, block_bytes=1 << 20) as source, KVMemory([(64, 1 << 20)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT, transports=[transport]) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT) as sender,
            ):
                incoming, neighbour = receiver.grant(range(60)), receiver.grant([60])
                outgoing = await sender.open(incoming.transfer_id, receiver.endpoint, incoming.block_ids)
                beside = await sender.open(neighbour.transfer_id, receiver.endpoint, neighbour.block_ids)
                sending = asyncio.create_task(outgoing.send([(index, index) for index in range(60)]))
                await asyncio.sleep(0)  # it has queued its blocks, and cannot have heard of their end
                sending.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await sending
                await outgoing.stop(10)
                with pytest.raises(TransferFenced):
                    await outgoing.finish()
                await beside.send([(0, 63)])
                await beside.finish()
                await neighbour.wait_landed()
                assert await incoming.fence(10)

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_open_when_cancelled_leaves_nothing_behind(transport: str) -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as source, KVMemory([(2, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT, transports=[transport]) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT) as sender,
            ):
                for num_steps in range(20):
                    incoming = receiver.grant([0])
                    opening = asyncio.create_task(sender.open(incoming.transfer_id, receiver.endpoint, incoming.block_ids))
                    for _ in range(num_steps):
                        await asyncio.sleep(0)
                    opening.cancel()
                    await asyncio.wait([opening])
                    assert await incoming.fence(10)

    run(main)


def test_inline_transfer_when_stopped_gives_no_more_blocks() -> None:
    async def main() -> None:
        with filled_memory(4, 1) as source, KVMemory([(4, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT, transports=["grpc"]) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT) as sender,
            ):
                incoming = receiver.grant([0, 1])
                outgoing = await sender.open(incoming.transfer_id, receiver.endpoint, incoming.block_ids)
                sending = asyncio.create_task(outgoing.send([(0, 0), (1, 1)]))
                await asyncio.sleep(0)
                await outgoing.stop(0)
                with pytest.raises(TransferFenced):
                    await sending
                with pytest.raises(TransferFenced):
                    await outgoing.send([(0, 0)])

    run(main)


@pytest.mark.parametrize("target_id", [0, 2])
def test_grant_when_a_block_of_another_size_is_named_over_shm_writes_no_byte_beside_its_place(target_id: int) -> None:
    """Only a receiver at fault does so: a small block for the place of a large one, or the other way round."""

    async def main() -> None:
        regions = [(2, BLOCK_BYTES), (2, BLOCK_BYTES // 2)]
        with KVMemory(regions) as source, KVMemory(regions) as target:
            source.buffer[:] = b"\x07" * source.pool_bytes
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT, transports=["shm"]) as sender,
            ):
                incoming = receiver.grant([target_id])
                outgoing = await sender.open(incoming.transfer_id, receiver.endpoint, [target_id])
                with contextlib.suppress(PeerUnavailable):  # it may have left its own pool by then
                    await outgoing.send([(0, 2 - target_id)])
                with pytest.raises(PeerUnavailable):
                    await incoming.wait_landed()
                assert await incoming.fence(5.0)
                assert not any(target.buffer)

    run(main)
