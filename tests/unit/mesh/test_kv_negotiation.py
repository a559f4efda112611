"""Which transport two workers agree on, and what they say when there is none."""

import asyncio
import dataclasses
import fcntl
import os
import socket

import pytest

from services.core.errors import Incompatible, InvalidRequest, PeerUnavailable, TransferFenced
from services.mesh.kv_transport import TRANSPORTS, KVEndpoint, KVMemory, KVReceiver, KVRegion, KVSender
from services.mesh.kv_wire import HELLO_BYTES, Frame, FrameKind, Refusal
from tests.unit.mesh.kv_peers import BLOCK_BYTES, LAYOUT, RawReceiver, run


async def negotiate(sender: KVSender, receiver: KVReceiver, endpoint: KVEndpoint) -> str:
    """The transport of a new transfer that one block proves."""
    incoming = receiver.grant([0])
    outgoing = await sender.open(incoming.transfer_id, endpoint, incoming.block_ids)
    for block in await outgoing.send([(0, 1)]):
        incoming.land_inline(block.index, block.data, block.checksum)
    await outgoing.finish()
    await incoming.wait_landed()
    return outgoing.transport


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("offered", "allowed", "agreed"),
    [
        (TRANSPORTS, TRANSPORTS, "shm"),
        (TRANSPORTS, ("grpc", "tcp"), "tcp"),
        (("grpc", "tcp"), TRANSPORTS, "tcp"),
        (("grpc",), TRANSPORTS, "grpc"),
        (("grpc", "shm"), ("grpc", "tcp"), "grpc"),
    ],
)
def test_open_when_several_transports_are_common_takes_the_best(offered: tuple[str, ...], allowed: tuple[str, ...], agreed: str) -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as source, KVMemory([(2, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT, transports=offered) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT, transports=allowed) as sender,
            ):
                endpoint = receiver.endpoint
                assert (bool(endpoint.shm_address), bool(endpoint.tcp_address), endpoint.grpc) == tuple(
                    name in offered for name in TRANSPORTS
                )
                assert await negotiate(sender, receiver, endpoint) == agreed
                assert endpoint.access_key.hex() not in repr(endpoint) and repr(endpoint.access_key) not in repr(endpoint)

    run(main)


def test_open_when_a_transport_cannot_be_reached_falls_to_the_next() -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as source, KVMemory([(2, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT) as sender,
            ):
                right = receiver.endpoint
                dead_port = free_port()
                elsewhere = dataclasses.replace(right, host_id="another kernel")
                no_shm = dataclasses.replace(right, shm_address="nobody-listens")
                no_tcp = dataclasses.replace(no_shm, tcp_address=f"127.0.0.1:{dead_port}")
                assert await negotiate(sender, receiver, elsewhere) == "tcp"
                assert await negotiate(sender, receiver, no_shm) == "tcp"
                assert await negotiate(sender, receiver, no_tcp) == "grpc"
                with socket.create_server(("127.0.0.1", dead_port)) as late:  # not tried again with every transfer
                    late.setblocking(False)
                    assert await negotiate(sender, receiver, no_tcp) == "grpc"
                    with pytest.raises(BlockingIOError):
                        late.accept()
                with pytest.raises(PeerUnavailable, match="shm or tcp"):
                    await sender.open(bytes(16), dataclasses.replace(no_tcp, grpc=False), [0])

    run(main)


def test_open_when_only_grpc_was_left_tries_the_better_ones_again_later() -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as source, KVMemory([(2, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT, transports=["tcp", "grpc"]) as sender,
            ):
                port = free_port()
                endpoint = dataclasses.replace(receiver.endpoint, tcp_address=f"127.0.0.1:{port}")
                assert await negotiate(sender, receiver, endpoint) == "grpc"
                peer = sender._peers[endpoint]
                retry_at = peer.inline_until
                assert retry_at > asyncio.get_running_loop().time()
                assert await negotiate(sender, receiver, endpoint) == "grpc"
                assert peer.inline_until == retry_at  # not put off by every transfer
                peer.inline_until = 0.0
                with socket.create_server(("127.0.0.1", port)) as late:
                    trying = asyncio.create_task(negotiate(sender, receiver, endpoint))
                    sock, _ = await asyncio.to_thread(late.accept)
                    sock.close()
                    assert await trying == "grpc"

    run(main)


def test_open_when_the_address_is_none_falls_to_the_next() -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as source, KVMemory([(2, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT, transports=["tcp", "grpc"]) as sender,
            ):
                for address in ("nonsense", "host:port", "[::1:1"):
                    endpoint = dataclasses.replace(receiver.endpoint, tcp_address=address)
                    assert await negotiate(sender, receiver, endpoint) == "grpc"

    run(main)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_open_when_the_two_sides_differ_is_incompatible_and_not_tried_by_other_means(transport: str) -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as source, KVMemory([(2, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT) as receiver:
                for layout, checksum in ((b"other", True), (LAYOUT, False)):
                    allowed = (transport, "grpc")
                    async with KVSender(source, layout_fingerprint=layout, transports=allowed, checksum=checksum) as sender:
                        incoming = receiver.grant([0])
                        with pytest.raises(Incompatible):
                            await sender.open(incoming.transfer_id, receiver.endpoint, incoming.block_ids)
                        assert await incoming.fence(0)

    run(main)


def test_open_when_nothing_is_common_or_the_pools_differ_is_incompatible() -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as source, KVMemory([(2, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT, transports=["tcp"]) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT, transports=["shm", "grpc"]) as sender,
            ):
                right = receiver.endpoint
                with pytest.raises(Incompatible, match="no KV transport in common"):
                    await sender.open(bytes(16), right, [0])
                with pytest.raises(Incompatible, match="bytes"):
                    await sender.open(bytes(16), dataclasses.replace(right, regions=(KVRegion(2, BLOCK_BYTES * 2),)), [0])
                for block_id in (2, -1):
                    with pytest.raises(Incompatible, match="outside"):
                        await sender.open(bytes(16), right, [block_id])

    run(main)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_open_when_the_id_is_no_id_or_in_use_is_refused(transport: str) -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as source, KVMemory([(2, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT, transports=[transport]) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT) as sender,
            ):
                for transfer_id in (b"", bytes(15), bytes(17)):
                    with pytest.raises(InvalidRequest):
                        await sender.open(transfer_id, receiver.endpoint, [0])
                incoming = receiver.grant([0])
                outgoing = await sender.open(incoming.transfer_id, receiver.endpoint, [0])
                if transport != "grpc":
                    with pytest.raises(TransferFenced):
                        await sender.open(incoming.transfer_id, receiver.endpoint, [0])
                for block in await outgoing.send([(0, 0)]):
                    incoming.land_inline(block.index, block.data, block.checksum)
                await incoming.wait_landed()

    run(main)


def test_open_when_the_key_is_wrong_is_refused_everywhere() -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as source, KVMemory([(2, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT, transports=["shm", "tcp"]) as sender,
            ):
                stale = dataclasses.replace(receiver.endpoint, access_key=os.urandom(16))
                with pytest.raises(PeerUnavailable):
                    await sender.open(bytes(16), stale, [0])

    run(main)


@pytest.mark.parametrize("fault", ["not sealed", "other size", "no descriptor", "refused", "hung up"])
def test_open_when_the_unix_socket_gives_no_sound_memory_falls_to_tcp(fault: str) -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as source, KVMemory([(2, BLOCK_BYTES)]) as target:
            async with (
                KVReceiver(target, layout_fingerprint=LAYOUT) as receiver,
                KVSender(source, layout_fingerprint=LAYOUT) as sender,
                asyncio.TaskGroup() as tasks,
            ):
                address = f"baton-test-{os.urandom(8).hex()}"
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                    listener.bind(f"\0{address}")
                    listener.listen()
                    tasks.create_task(asyncio.to_thread(_answer_badly, listener, fault))
                    assert await negotiate(sender, receiver, dataclasses.replace(receiver.endpoint, shm_address=address)) == "tcp"

    run(main)


def _answer_badly(listener: socket.socket, fault: str) -> None:
    sock, _ = listener.accept()
    fd = os.memfd_create("bad", os.MFD_ALLOW_SEALING)
    with sock:
        sock.recv(HELLO_BYTES)
        os.ftruncate(fd, BLOCK_BYTES if fault == "other size" else 2 * BLOCK_BYTES)
        if fault != "not sealed":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        if fault == "refused":
            # With a descriptor all the same, which must not be kept.
            socket.send_fds(sock, [Frame(FrameKind.REFUSED, refusal=Refusal.WRONG_KEY).pack()], [fd])
        elif fault == "no descriptor":
            sock.sendall(Frame(FrameKind.WELCOME).pack())
        elif fault != "hung up":
            socket.send_fds(sock, [Frame(FrameKind.WELCOME).pack()], [fd])
        os.close(fd)


@pytest.mark.parametrize("answer", [Frame(FrameKind.BLOCK), Frame(FrameKind.STOP, bytes(16)), Frame(FrameKind.WELCOME)])
def test_sender_when_the_receiver_says_what_is_not_for_senders_ends_the_connection(answer: Frame) -> None:
    async def main() -> None:
        with KVMemory([(2, BLOCK_BYTES)]) as source, RawReceiver() as receiver:
            async with KVSender(source, layout_fingerprint=LAYOUT) as sender, asyncio.TaskGroup() as tasks:
                opening = tasks.create_task(sender.open(b"1" * 16, receiver.endpoint, [0]))
                await receiver.welcome()
                await receiver.accept_open()
                outgoing = await opening
                receiver.say(answer)
                with pytest.raises(ConnectionResetError):  # noqa: PT012
                    while True:
                        await receiver.hear()
                with pytest.raises(PeerUnavailable):
                    await outgoing.send([(0, 0)])

    run(main)


@pytest.mark.parametrize("num_opens", [1, 8])
def test_connection_when_the_receiver_came_back_is_made_anew(num_opens: int) -> None:
    async def main() -> None:
        with KVMemory([(8, BLOCK_BYTES)]) as source, KVMemory([(8, BLOCK_BYTES)]) as target:
            async with KVSender(source, layout_fingerprint=LAYOUT) as sender:
                for _ in range(3):
                    async with KVReceiver(target, layout_fingerprint=LAYOUT, transports=["tcp"]) as receiver:
                        grants = [receiver.grant([number]) for number in range(num_opens)]
                        opened = await asyncio.gather(
                            *(sender.open(grant.transfer_id, receiver.endpoint, grant.block_ids) for grant in grants)
                        )
                        for outgoing, grant in zip(opened, grants, strict=True):
                            await outgoing.send([(0, 0)])
                            await grant.wait_landed()
                        assert len(receiver._connections) == 1

    run(main)
