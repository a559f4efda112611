"""`micro kv-transfer`: bytes per second of the KV data plane between two processes, beside what a bare socket and a bare memcpy get.

Both sides' pools are larger than any cache, and blocks come in a shuffled order, as in a pool that has been in use. This process is the
receiver; a rate is the bytes that have landed, were checked and are ours, over the time since the sender was told to begin. References
run in the same two processes, between the measurements, and medians count.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np

from loadtest.micro.figure import Figure
from loadtest.micro.kv_transfer_sender import LAYOUT
from loadtest.micro.processes import START_TIMEOUT_S
from protos.baton.v1 import prefill_pb2, prefill_pb2_grpc
from services.mesh import convert
from services.mesh.child_process import bound_to_parent
from services.mesh.kv_transport import KVMemory, KVReceiver

POOL_BYTES = 512 << 20
# 64 tokens of a small model, of a 1B model, and of an 8B Llama 3 in 16 bits.
BLOCK_BYTES = {"256 KiB": 256 << 10, "1 MiB": 1 << 20, "8 MiB": 8 << 20}
# The inline transport is slow: it sends this part of the pool.
GRPC_BYTES = 128 << 20


def measure(*, runs: int) -> tuple[list[Figure], dict[str, object]]:
    """All figures of the data plane, and the conditions they hold under."""
    figures = []
    for name, block_bytes in BLOCK_BYTES.items():
        rates = _measure_block_size(block_bytes, runs)
        medians = {key: statistics.median(values) for key, values in rates.items()}
        checked_bound = 1 / (1 / medians["memcpy"] + 1 / medians["checksum"])
        rows = [
            ("tcp unchecked", medians["bare tcp"], "bare TCP", 0.9),
            ("tcp", medians["bare tcp"], "bare TCP", 0.8),
            ("shm unchecked", medians["memcpy"], "memcpy", 0.8),
            ("shm unchecked", medians["memcpy by block"], "memcpy by block", None),
            ("shm", checked_bound, "memcpy, then checksum", 0.8),
            ("grpc", medians["bare tcp"], "bare TCP", None),
        ]
        figures += [
            Figure(
                name=f"{transport}, {name}",
                value=medians[transport],
                unit="GB/s",
                runs=runs,
                reference=reference,
                reference_name=reference_name,
                target=target,
            )
            for transport, reference, reference_name, target in rows
        ]
        figures.append(Figure(name=f"checksum, {name}", value=medians["checksum"], unit="GB/s", runs=runs))
    return figures, {
        "pool": f"{POOL_BYTES >> 20} MiB",
        "checksum": "xxh3_64",
        "threads": "2 copy over shm, 1 in memcpy",
        "python": sys.version.split()[0],
        "numpy": np.__version__,
    }


def _measure_block_size(block_bytes: int, runs: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {}
    num_blocks = POOL_BYTES // block_bytes
    with KVMemory([(num_blocks, block_bytes)]) as memory, _sender_process(num_blocks, block_bytes) as sender:
        asyncio.run(_Bench(memory, sender).measure(runs, rates))
    return rates


class _Sender:
    """A running kv_transfer_sender."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.grpc_address: str = self._read()["grpc"]

    def begin(self, do: str, **arguments: object) -> None:
        self._write({"do": do} | arguments)

    def wait_ready(self) -> None:
        self._read()

    def prepare(self, do: str, **arguments: object) -> None:
        self.begin(do, **arguments)
        self.wait_ready()

    def go(self) -> None:
        self._write({})

    def wait_done(self) -> float:
        """The seconds that the sending side took."""
        return float(self._read()["seconds"])

    def _write(self, value: dict[str, object]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the sending process ended")
        value: dict[str, Any] = json.loads(line)
        return value


@contextlib.contextmanager
def _sender_process(num_blocks: int, block_bytes: int) -> Iterator[_Sender]:
    command = bound_to_parent([sys.executable, "-m", "loadtest.micro.kv_transfer_sender", str(num_blocks), str(block_bytes)])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _Sender(process)
        finally:
            assert process.stdin
            process.stdin.close()
            process.wait()


class _Bench:
    def __init__(self, memory: KVMemory, sender: _Sender) -> None:
        self._memory = memory
        self._sender = sender
        self._random = random.Random(1)

    async def measure(self, runs: int, rates: dict[str, list[float]]) -> None:
        """Appends GB/s to `rates`, by name; a first round only warms up: connections are made and pages mapped once, as in a worker."""
        async with contextlib.AsyncExitStack() as stack:
            receivers = {
                (transport, checksum): await stack.enter_async_context(
                    KVReceiver(self._memory, layout_fingerprint=LAYOUT, transports=(transport,), checksum=checksum)
                )
                for transport in ("tcp", "shm", "grpc")
                for checksum in (True, False)
            }
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(self._sender.grpc_address, options=[("grpc.max_receive_message_length", -1)])
            )
            for round_number in range(runs + 1):
                for name, rate in [
                    ("bare tcp", await asyncio.to_thread(self._bare_tcp)),
                    ("tcp unchecked", await self._push(receivers["tcp", False], checksum=False)),
                    ("tcp", await self._push(receivers["tcp", True], checksum=True)),
                    ("memcpy", self._reference("memcpy")),
                    ("shm unchecked", await self._push(receivers["shm", False], checksum=False)),
                    ("memcpy by block", self._reference("memcpy by block")),
                    ("checksum", self._reference("checksum")),
                    ("shm", await self._push(receivers["shm", True], checksum=True)),
                    ("grpc", await self._grpc(receivers["grpc", True], prefill_pb2_grpc.PrefillServiceStub(channel))),
                ]:
                    if round_number:
                        rates.setdefault(name, []).append(rate / 1e9)

    def _shuffled(self) -> list[int]:
        return self._random.sample(range(self._memory.num_blocks), self._memory.num_blocks)

    async def _push(self, receiver: KVReceiver, *, checksum: bool) -> float:
        transfer = receiver.grant(self._shuffled())
        endpoint = dataclasses.asdict(receiver.endpoint) | {"access_key": receiver.endpoint.access_key.hex()}
        await asyncio.to_thread(
            self._sender.prepare,
            "push",
            checksum=checksum,
            endpoint=endpoint,
            transfer_id=transfer.transfer_id.hex(),
            block_ids=transfer.block_ids,
            source_ids=self._shuffled(),
        )
        started = time.perf_counter()
        self._sender.go()
        await transfer.wait_landed()
        elapsed = time.perf_counter() - started
        self._sender.wait_done()
        return POOL_BYTES / elapsed

    def _bare_tcp(self) -> float:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(START_TIMEOUT_S)
            self._sender.begin("bare tcp", port=listener.getsockname()[1], source_ids=self._shuffled())
            sock, _ = listener.accept()
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sender.wait_ready()
            block_ids = self._shuffled()
            started = time.perf_counter()
            self._sender.go()
            for block_id in block_ids:
                rest = self._memory.block(block_id)
                while rest:
                    rest = rest[sock.recv_into(rest) :]
            elapsed = time.perf_counter() - started
        self._sender.wait_done()
        return POOL_BYTES / elapsed

    def _reference(self, name: str) -> float:
        self._sender.prepare(name)
        self._sender.go()
        return POOL_BYTES / self._sender.wait_done()

    async def _grpc(self, receiver: KVReceiver, stub: Any) -> float:
        num_blocks = GRPC_BYTES // self._memory.map.regions[0].block_bytes
        transfer = receiver.grant(self._shuffled()[:num_blocks])
        grant = prefill_pb2.KVGrant(
            transfer_id=transfer.transfer_id,
            block_ids=np.array(transfer.block_ids, "<u4").tobytes(),
            endpoint=convert.endpoint_to_proto(receiver.endpoint),
        )
        started = time.perf_counter()
        async for event in stub.Prefill(prefill_pb2.PrefillRequest(grant=grant)):
            transfer.land_inline(event.block.index, event.block.data, event.block.checksum)
        await transfer.wait_landed()
        return GRPC_BYTES / (time.perf_counter() - started)
