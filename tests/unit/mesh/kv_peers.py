"""Peers for tests of the KV data plane: ones that speak it by hand, so that they can break it, and a check that nothing is left behind."""

import array
import asyncio
import gc
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import uvloop

from services.mesh.kv_memory import KVMemory, KVRegion
from services.mesh.kv_wire import FRAME_BYTES, HELLO_BYTES, Frame, FrameKind, Hello, KVEndpoint, layout_digest

LAYOUT = b"a layout"
BLOCK_BYTES = 64 << 10
DEADLINE_S = 20.0  # for what is expected to happen at once


def run(main: Callable[[], Coroutine[Any, Any, None]], *, on_uvloop: bool = False) -> None:
    """asyncio.run within a deadline; then no thread and no descriptor may be left that was not there before."""

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await main()

    start = uvloop.run if on_uvloop else asyncio.run
    start(asyncio.sleep(0))  # libuv keeps a few descriptors from its first loop on
    threads, descriptors = set(threading.enumerate()), _descriptors()
    start(bounded())
    gc.collect()
    # Fewer is fine: what a test before this one left to gRPC may be closed meanwhile, or come and go for a moment.
    assert set(threading.enumerate()) <= threads
    ends_at = time.monotonic() + 5.0
    while (left := dict(_descriptors().items() - descriptors.items())) and time.monotonic() < ends_at:
        time.sleep(0.05)
    assert not left


def _descriptors() -> dict[str, str]:
    links = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            links[path.name] = os.readlink(path)
        except FileNotFoundError:
            continue  # the one that lists the folder
    return links


@contextmanager
def filled_memory(num_blocks: int, seed: int, *, block_bytes: int = BLOCK_BYTES) -> Iterator[KVMemory]:
    """A pool of random bytes."""
    with KVMemory([(num_blocks, block_bytes)]) as memory:
        memory.buffer[:] = random.Random(seed).randbytes(memory.pool_bytes)
        yield memory


def block_bytes(memory: KVMemory, block_id: int) -> bytes:
    return bytes(memory.block(block_id))


def assert_only_changed(memory: KVMemory, before: bytes, block_ids: set[int]) -> None:
    """All blocks but `block_ids` are as they were."""
    old = np.frombuffer(before, np.uint8).reshape(memory.blocks[0].shape)
    changed = set(np.nonzero((memory.blocks[0] != old).any(axis=1))[0].tolist())
    assert changed <= block_ids


async def wait_until(condition: Callable[[], bool]) -> None:
    """Polls for what another thread does; run() bounds it."""
    while not condition():  # noqa: ASYNC110 (threads make it true)
        await asyncio.sleep(0.001)


class RawSender:
    """A connection to a KVReceiver that says whatever a test wants."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(DEADLINE_S)
        self.memory_fd: int | None = None

    @classmethod
    async def dial(cls, endpoint: KVEndpoint, transport: str) -> Self:
        if transport == "tcp":
            host, _, port = endpoint.tcp_address.rpartition(":")
            return cls(socket.create_connection((host, int(port))))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(f"\0{endpoint.shm_address}")
        return cls(sock)

    @classmethod
    async def join(cls, endpoint: KVEndpoint, transport: str) -> Self:
        """Dials, and is welcomed."""
        peer = await cls.dial(endpoint, transport)
        peer.sock.sendall(hello(endpoint).pack())
        answer = await peer.hear()
        assert answer and answer.kind is FrameKind.WELCOME
        assert (peer.memory_fd is not None) == (transport == "shm")
        return peer

    async def open(self, transfer_id: bytes) -> Frame | None:
        self.say(Frame(FrameKind.OPEN, transfer_id))
        return await self.hear()

    def say(self, frame: Frame, payload: bytes = b"") -> None:
        self.sock.sendall(frame.pack() + payload)

    async def hear(self) -> Frame | None:
        """The receiver's next frame; None: it has closed the connection."""

        def recv() -> bytes:
            fds = array.array("i")
            try:
                data, ancillary, _, _ = self.sock.recvmsg(FRAME_BYTES, socket.CMSG_LEN(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                return b""
            for _, _, content in ancillary:
                fds.frombytes(content)
                self.memory_fd = fds[0]
            return data

        data = await asyncio.to_thread(recv)
        return Frame.unpack(data) if data else None

    def close(self) -> None:
        self.sock.close()
        if self.memory_fd is not None:
            os.close(self.memory_fd)
            self.memory_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def hello(endpoint: KVEndpoint, *, access_key: bytes | None = None, layout: bytes = LAYOUT, checksum: bool = True) -> Hello:
    """The hello that this endpoint expects, or a wrong one."""
    return Hello(
        access_key=access_key or endpoint.access_key,
        layout_digest=layout_digest(layout, [region.block_bytes for region in endpoint.regions]),
        checksum=checksum,
    )


class RawReceiver:
    """A TCP listener that a KVSender takes for a receiver; it reads only what a test asks it to."""

    def __init__(self, *, num_blocks: int = 64, block_bytes: int = BLOCK_BYTES) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(DEADLINE_S)
        self._sock: socket.socket | None = None
        self.endpoint = KVEndpoint(
            host_id="",
            shm_address="",
            tcp_address=f"127.0.0.1:{self._listener.getsockname()[1]}",
            grpc=False,
            access_key=bytes(16),
            regions=(KVRegion(num_blocks, block_bytes),),
        )

    async def welcome(self, answer: Frame | None = None) -> None:
        """Accepts a connection, in place of an earlier one, and answers its hello."""

        def accept() -> None:
            if self._sock:
                self._sock.close()
            self._sock, _ = self._listener.accept()
            self._sock.settimeout(DEADLINE_S)
            self._recv(HELLO_BYTES)
            self.say(answer or Frame(FrameKind.WELCOME))

        await asyncio.to_thread(accept)

    async def accept_open(self) -> bytes:
        """Answers the next OPEN; returns its transfer id."""
        frame, _ = await self.hear()
        assert frame.kind is FrameKind.OPEN
        self.say(Frame(FrameKind.OPENED, frame.transfer_id))
        return frame.transfer_id

    async def hear(self) -> tuple[Frame, bytes]:
        """The next frame with its payload."""

        def recv() -> tuple[Frame, bytes]:
            frame = Frame.unpack(self._recv(FRAME_BYTES))
            return frame, self._recv(frame.length)

        return await asyncio.to_thread(recv)

    def say(self, frame: Frame) -> None:
        assert self._sock
        self._sock.sendall(frame.pack())

    def _recv(self, num_bytes: int) -> bytes:
        assert self._sock
        data = bytearray()
        while len(data) < num_bytes:
            part = self._sock.recv(num_bytes - len(data))
            if not part:
                raise ConnectionResetError("the sender closed the connection")
            data += part
        return bytes(data)

    def close(self) -> None:
        self._listener.close()
        if self._sock:
            self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
