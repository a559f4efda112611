"""What a receiver makes of peers that are wrong, hostile or broken: typed refusals, bounded everything, and no byte outside of a grant."""

import asyncio
import dataclasses
import os
import random
import socket

import pytest

from services.core.errors import PeerUnavailable
from services.mesh.kv_transport import IncomingTransfer, KVMemory, KVReceiver
from services.mesh.kv_wire import FRAME_BYTES, HELLO_BYTES, Frame, FrameKind, Hello, Refusal, block_checksum, layout_digest
from tests.unit.mesh.kv_peers import BLOCK_BYTES, LAYOUT, RawSender, assert_only_changed, filled_memory, hello, run, wait_until

BLOCK = bytes(range(256)) * (BLOCK_BYTES // 256)


def block_frame(transfer_id: bytes, index: int, *, length: int = BLOCK_BYTES) -> Frame:
    return Frame(FrameKind.BLOCK, transfer_id, index, length, block_checksum(BLOCK))


async def assert_serves(receiver: KVReceiver, block_id: int) -> None:
    """The receiver still takes blocks from a good peer."""
    transfer = receiver.grant([block_id])
    with await RawSender.join(receiver.endpoint, "tcp") as peer:
        await peer.open(transfer.transfer_id)
        peer.say(block_frame(transfer.transfer_id, 0), BLOCK)
        await transfer.wait_landed()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("wrong", ["key", "layout", "block_bytes", "checksum"])
def test_hello_when_something_differs_is_refused_with_the_reason(transport: str, wrong: str) -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                endpoint = receiver.endpoint
                greeting, refusal = {
                    "key": (hello(endpoint, access_key=os.urandom(16)), Refusal.WRONG_KEY),
                    "layout": (hello(endpoint, layout=b"other"), Refusal.OTHER_LAYOUT),
                    "block_bytes": (_other_block_bytes(hello(endpoint)), Refusal.OTHER_LAYOUT),
                    "checksum": (hello(endpoint, checksum=False), Refusal.OTHER_CHECKSUM),
                }[wrong]
                with await RawSender.dial(endpoint, transport) as peer:
                    peer.sock.sendall(greeting.pack())
                    assert await peer.hear() == Frame(FrameKind.REFUSED, refusal=refusal)
                    assert await peer.hear() is None
                    assert peer.memory_fd is None
                await assert_serves(receiver, 0)

    run(main)


def _other_block_bytes(right: Hello) -> Hello:
    return dataclasses.replace(right, layout_digest=layout_digest(LAYOUT, [BLOCK_BYTES * 2]))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(
    "greeting",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n" + bytes(HELLO_BYTES), id="http"),
        pytest.param(random.Random(0).randbytes(HELLO_BYTES), id="noise"),
        pytest.param(b"bKV0" + bytes(HELLO_BYTES - 4), id="another version"),
    ],
)
def test_hello_when_it_is_none_gets_no_answer(transport: str, greeting: bytes) -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                with await RawSender.dial(receiver.endpoint, transport) as peer:
                    peer.sock.sendall(greeting)
                    assert await peer.hear() is None
                await assert_serves(receiver, 0)

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("num_bytes", [0, 10])
def test_stranger_when_silent_is_hung_up_on(transport: str, num_bytes: int) -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, handshake_timeout_s=0.02) as receiver:
                with await RawSender.dial(receiver.endpoint, transport) as peer:
                    if num_bytes:
                        peer.sock.sendall(hello(receiver.endpoint).pack()[:num_bytes])
                    assert await peer.hear() is None

    run(main)


def test_receiver_when_closed_under_a_silent_stranger_does_not_wait_for_it() -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, handshake_timeout_s=3600) as receiver:
                peer = await RawSender.dial(receiver.endpoint, "tcp")
                await wait_until(lambda: len(receiver._strangers) == 1)
            assert await peer.hear() is None
            peer.close()

    run(main)


def test_strangers_and_connections_when_they_are_too_many_are_turned_away() -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, max_connections=2) as receiver:
                crowd = [await RawSender.dial(receiver.endpoint, "tcp") for _ in range(5)]
                strangers = crowd[3:]
                for peer in crowd[:3]:
                    assert await peer.hear() is None, "who came first goes first"
                    peer.close()
                for peer in strangers:
                    peer.sock.sendall(hello(receiver.endpoint).pack())
                    assert await peer.hear() == Frame(FrameKind.WELCOME)
                with await RawSender.dial(receiver.endpoint, "tcp") as third:
                    third.sock.sendall(hello(receiver.endpoint).pack())
                    assert await third.hear() == Frame(FrameKind.REFUSED, refusal=Refusal.FULL)
                for peer in strangers:
                    peer.close()
                await wait_until(lambda: not receiver._connections)
                await assert_serves(receiver, 0)

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(
    "violation",
    ["length above", "length below", "length zero", "huge length", "index outside", "twice", "garbage", "wrong kind", "stopped", "half"],
)
def test_peer_when_it_breaks_the_protocol_loses_the_connection_and_its_transfers(transport: str, violation: str) -> None:
    if violation == "stopped" and transport == "shm":
        return  # the one place where it is due

    async def main() -> None:
        with filled_memory(8, 1) as target:
            before = bytes(target.buffer)
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                with await RawSender.join(receiver.endpoint, transport) as peer:
                    used, unused = receiver.grant([1, 2]), receiver.grant([3])
                    await peer.open(used.transfer_id)
                    if transport == "shm":
                        target.block(1)[:] = BLOCK  # as the sender would
                    peer.say(block_frame(used.transfer_id, 0), BLOCK if transport == "tcp" else b"")
                    await wait_until(lambda: used.num_landed == 1)
                    peer.sock.sendall(
                        {
                            "length above": block_frame(used.transfer_id, 1, length=BLOCK_BYTES + 1).pack(),
                            "length below": block_frame(used.transfer_id, 1, length=BLOCK_BYTES - 1).pack(),
                            "length zero": block_frame(used.transfer_id, 1, length=0).pack(),
                            "huge length": block_frame(os.urandom(16), 1, length=2**64 - 1).pack(),
                            "index outside": block_frame(used.transfer_id, 2).pack(),
                            "twice": block_frame(used.transfer_id, 0).pack(),
                            "garbage": os.urandom(FRAME_BYTES),
                            "wrong kind": Frame(FrameKind.STOP, used.transfer_id).pack(),
                            "stopped": Frame(FrameKind.STOPPED, used.transfer_id).pack(),
                            "half": Frame(FrameKind.OPEN, unused.transfer_id).pack()[:-1],
                        }[violation]
                    )
                    if violation == "half" and transport == "tcp":
                        peer.sock.shutdown(socket.SHUT_WR)
                    with pytest.raises(PeerUnavailable, match="broke the protocol"):
                        await used.wait_landed()
                    assert await peer.hear() is None
                assert await used.fence(10)
                assert not unused.is_fenced
                assert_only_changed(target, before, {1})
                await assert_serves(receiver, 7)

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_block_when_its_transfer_is_unknown_or_another_connections_is_read_past(transport: str) -> None:
    async def main() -> None:
        with filled_memory(4, 1) as target:
            before = bytes(target.buffer)
            payload = BLOCK if transport == "tcp" else b""
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                with (
                    await RawSender.join(receiver.endpoint, transport) as peer,
                    await RawSender.join(receiver.endpoint, transport) as owner,
                ):
                    owned, unopened, mine = receiver.grant([0]), receiver.grant([1]), receiver.grant([2])
                    await owner.open(owned.transfer_id)
                    answer = await peer.open(owned.transfer_id)
                    assert answer == Frame(FrameKind.REFUSED, owned.transfer_id, refusal=Refusal.NO_SUCH_GRANT)
                    for transfer_id in (os.urandom(16), owned.transfer_id, unopened.transfer_id):
                        peer.say(block_frame(transfer_id, 0), payload)
                    await peer.open(mine.transfer_id)
                    if transport == "shm":
                        target.block(2)[:] = BLOCK
                    peer.say(block_frame(mine.transfer_id, 0), payload)
                    await mine.wait_landed()
                    assert owned.num_landed == unopened.num_landed == 0
                    assert_only_changed(target, before, {2})

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("seed", range(3))
def test_peers_when_they_send_mutated_conversations_change_nothing_outside_of_their_grants(transport: str, seed: int) -> None:
    dice = random.Random(seed)

    def conversation(transfer: IncomingTransfer) -> list[bytes]:
        """A good one, with some bytes changed, cut out, doubled or in another order."""
        frames = [Frame(FrameKind.OPEN, transfer.transfer_id).pack()]
        for index in range(len(transfer.block_ids)):
            frames.append(block_frame(transfer.transfer_id, index).pack() + (BLOCK if transport == "tcp" else b""))
        number = dice.randrange(len(frames))
        match dice.choice(["flip", "cut", "double", "swap", "insert"]):
            case "flip":
                position = dice.randrange(FRAME_BYTES)
                frame = frames[number]
                frames[number] = frame[:position] + bytes([frame[position] ^ (1 << dice.randrange(8))]) + frame[position + 1 :]
            case "cut":
                frames[number] = frames[number][: dice.randrange(1, FRAME_BYTES)]
            case "double":
                frames.insert(number, frames[number])
            case "swap":
                dice.shuffle(frames)
            case "insert":
                frames.insert(number, dice.randbytes(dice.randrange(1, 3 * FRAME_BYTES)))
        return frames

    async def main() -> None:
        with filled_memory(16, seed) as target:
            before = bytes(target.buffer)
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                for _ in range(40):
                    transfer = receiver.grant([3, 8, 5])
                    with await RawSender.join(receiver.endpoint, transport) as peer:
                        try:
                            for part in conversation(transfer):
                                peer.sock.sendall(part)
                        except OSError:
                            pass  # it was thrown out already
                        peer.sock.shutdown(socket.SHUT_WR)
                        while await peer.hear():
                            pass
                    assert await transfer.fence(10)
                assert_only_changed(target, before, {3, 8, 5})
                await assert_serves(receiver, 0)

    run(main)


def test_peer_when_it_never_reads_its_answers_cannot_hold_up_the_receivers_end() -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                peer = await RawSender.join(receiver.endpoint, "tcp")
                peer.sock.setblocking(False)
                opens = unsent = Frame(FrameKind.OPEN).pack() * 1000
                num_blocked = 0
                while num_blocked < 50:  # until the receiver's answers fill both sides' buffers, and then the questions
                    try:
                        unsent = unsent[peer.sock.send(unsent) :] or opens  # whole frames: half a one would break the protocol
                        num_blocked = 0
                    except BlockingIOError:
                        num_blocked += 1
                        await asyncio.sleep(0.001)
                await assert_serves(receiver, 0)
            peer.close()

    run(main)


def test_stranger_when_of_another_user_is_not_heard_over_the_unix_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # so the one who connects is somebody else
                with await RawSender.dial(receiver.endpoint, "shm") as peer:
                    peer.sock.send(hello(receiver.endpoint).pack())
                    assert await peer.hear() is None
                    assert peer.memory_fd is None
                await assert_serves(receiver, 0)

    run(main)


def test_strangers_when_a_crowd_waits_without_a_word_do_not_keep_a_good_sender_out() -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, max_connections=8, handshake_timeout_s=3600) as receiver:
                crowd = [await RawSender.dial(receiver.endpoint, "tcp") for _ in range(40)]
                await wait_until(lambda: len(receiver._strangers) == 8)
                await assert_serves(receiver, 0)
                for peer in crowd:
                    peer.close()
                await wait_until(lambda: not receiver._strangers)

    run(main)
