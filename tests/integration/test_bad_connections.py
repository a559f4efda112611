"""What anybody who can connect may do to a port: garbage, half sentences, crowds that wait. All goes on, and no descriptor is lost."""

import asyncio
import contextlib
import os
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from protos.baton.v1 import kv_index_pb2, kv_index_pb2_grpc
from services.core.types import SamplingParams
from services.kv_index.process import serve as serve_index
from services.kv_index.settings import KVIndexSettings
from services.mesh.kv_wire import HELLO_BYTES
from services.mesh.server import MeshServer
from tests.mesh import Mesh, free_port
from tests.waiting import wait_until

GOOD = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes(3) + b"\4" + bytes(5)
CROWD = 300


def frame(kind: int, payload: bytes, *, flags: int = 0, stream: int = 1, length: int | None = None) -> bytes:
    """An HTTP/2 frame whose length may be a lie."""
    return struct.pack(">I", len(payload) if length is None else length)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


# Whether a server hangs up at once, later or never, it must not matter to anybody.
GARBAGE = {
    "nothing": b"",
    "HTTP/1": b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{",
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(160),
    "noise": random.Random(0).randbytes(1 << 16),
    "zeros": bytes(1 << 16),
    "half a preface": PREFACE[:11],
    "a preface": PREFACE,
    "half a frame": PREFACE + SETTINGS[:5],
    "a frame without end": PREFACE + SETTINGS + frame(0, b"x", length=(1 << 24) - 1),
    "headers cut off": PREFACE + SETTINGS + frame(1, b"\x82\x86", length=16_000),
    "headers that are none": PREFACE + SETTINGS + frame(1, b"\xff" * 100, flags=4),
    "a header table without end": PREFACE + SETTINGS + frame(1, b"\x3f\xff\xff\xff\xff\x0f", flags=4),
    "continuations without end": PREFACE + SETTINGS + frame(1, b"") + frame(9, b"\x00") * 5000,
    "data of no stream": PREFACE + SETTINGS + frame(0, bytes(100), stream=99),
    "pings": PREFACE + SETTINGS + frame(6, bytes(8), stream=0) * 2000,
    "resets": PREFACE + SETTINGS + b"".join(frame(1, b"", flags=4, stream=n) + frame(3, bytes(4), stream=n) for n in range(1, 2001, 2)),
    "settings that cannot be": PREFACE + frame(4, struct.pack(">HI", 5, 1) * 100, stream=0),
    "a hello of zeros": bytes(HELLO_BYTES),
    "half a hello": b"bKV1" + bytes(7),
}


@dataclass(slots=True)
class Bench:
    """A mesh with an index; `ports` are all on which its processes listen over TCP, `shm` is decode's Unix socket."""

    mesh: Mesh
    router: str
    index: str
    ports: dict[str, str]
    shm: str

    async def connect(self, address: str) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        host, _, port = address.rpartition(":")
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        return sock

    async def assert_serves(self, tokens: list[list[int]]) -> None:
        async with asyncio.timeout(20):
            assert (await self.mesh.generate(self.router, "def f(", GOOD)).tokens == tokens
            matches = await kv_index_pb2_grpc.KVIndexServiceStub(self.mesh.channel(self.index)).Match(
                kv_index_pb2.MatchRequest(hashes=bytes(16))
            )
            assert not matches.matches


def run(test: Callable[[Bench], Coroutine[None, None, None]]) -> None:
    """While the test does its worst, requests are served; afterwards all its descriptors are free, and all blocks."""

    async def main() -> None:
        async with asyncio.timeout(100), bench() as ready:
            expected = (await ready.mesh.generate(ready.router, "def f(", GOOD)).tokens
            await ready.assert_serves(expected)
            before = num_descriptors()
            testing = asyncio.ensure_future(test(ready))
            while not testing.done():
                await ready.assert_serves(expected)
            await testing
            await ready.assert_serves(expected)
            await wait_until(lambda: num_descriptors() <= before, timeout_s=30.0)
            for load in (await ready.mesh.loads(ready.router)).values():
                assert load.blocks_free + load.blocks_cached == load.blocks_total

    asyncio.run(main())


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    index, kv_port = f"127.0.0.1:{free_port()}", free_port()
    stop = asyncio.Event()
    sockets = unix_sockets()
    async with asyncio.TaskGroup() as tasks, Mesh("demo", kv_index=(index,)) as mesh:
        tasks.create_task(serve_index(KVIndexSettings(listen=index), stop))
        prefill, decode = await mesh.prefill("p0"), await mesh.decode("d0", kv_port=kv_port)
        router = await mesh.router([prefill, decode], max_local_tokens=0, kv_index=(index,))
        (shm,) = unix_sockets() - sockets
        ports = {
            "router": router,
            "prefill": prefill.rpartition("@")[2],
            "decode": decode.rpartition("@")[2],
            "kv_index": index,
            "kv": f"127.0.0.1:{kv_port}",
        }
        yield Bench(mesh, router, index, ports, shm)
        stop.set()


def unix_sockets() -> set[str]:
    """Of this process: others on the machine may serve a mesh, too."""
    own = set(re.findall(r"socket:\[(\d+)\]", " ".join(descriptor_targets())))
    rows = re.findall(r"(\d+) @(baton-kv-[0-9a-f]{32})$", Path("/proc/net/unix").read_text(), re.MULTILINE)
    return {name for inode, name in rows if inode in own}


def descriptor_targets() -> list[str]:
    targets = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            targets.append(os.readlink(path))
    return targets


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_ports_when_they_are_sent_garbage_serve_the_others_and_keep_nothing() -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        for address in bench.ports.values():
            held = []
            for data in GARBAGE.values():
                sock = await bench.connect(address)
                held.append(sock)
                with contextlib.suppress(OSError, TimeoutError):  # it may hang up at any byte
                    async with asyncio.timeout(2):
                        await loop.sock_sendall(sock, data)
            await asyncio.sleep(0.05)
            for sock in held:
                sock.close()
        for data in GARBAGE.values():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(f"\0{bench.shm}")
                with contextlib.suppress(OSError):
                    sock.send(data[:4096])

    run(test)


def test_ports_when_a_crowd_connects_and_waits_serve_the_others_and_get_their_descriptors_back() -> None:
    async def test(bench: Bench) -> None:
        for address in bench.ports.values():
            crowd = [await bench.connect(address) for _ in range(CROWD)]
            await asyncio.sleep(0.5)
            for sock in crowd:
                sock.close()

    run(test)


def test_ports_when_bytes_come_one_by_one_serve_the_others() -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        slow = [await bench.connect(address) for address in bench.ports.values() for _ in range(10)]
        for position in range(20):
            for sock in slow:
                with contextlib.suppress(OSError):
                    await loop.sock_sendall(sock, PREFACE[position : position + 1])
            await asyncio.sleep(0.1)
        for sock in slow:
            sock.close()

    run(test)


@pytest.mark.parametrize("said", [b"", PREFACE[:11], PREFACE, PREFACE + SETTINGS[:5]])
def test_server_when_somebody_stops_speaking_hangs_up(said: bytes) -> None:
    async def main() -> None:
        def register(server: grpc.aio.Server) -> None:
            pass

        async with MeshServer("127.0.0.1:0", register, services=[], handshake_timeout_s=0.3) as server:
            reader, writer = await asyncio.open_connection(*server.address.split(":"))
            writer.write(said)
            try:
                async with asyncio.timeout(10):
                    while await reader.read(1 << 16):
                        pass
            finally:
                writer.close()
                await writer.wait_closed()

    asyncio.run(main())
