"""The sending process of `micro kv-transfer`: obeys lines of JSON on standard input and answers each with one on standard output.

A command first prepares and answers {}, then waits for a further line, acts, and answers with its seconds. Ends with standard input.
"""

import asyncio
import json
import random
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np

from protos.baton.v1 import prefill_pb2, prefill_pb2_grpc
from services.mesh import convert
from services.mesh.kv_transport import KVEndpoint, KVMemory, KVRegion, KVSender
from services.mesh.kv_wire import block_checksum

LAYOUT = b"benchmark"


def main(num_blocks: int, block_bytes: int) -> None:
    asyncio.run(_serve(num_blocks, block_bytes))


async def _serve(num_blocks: int, block_bytes: int) -> None:
    with KVMemory([(num_blocks, block_bytes)]) as memory, KVMemory([(num_blocks, block_bytes)]) as other:
        memory.blocks[0][:] = np.frombuffer(random.Random(0).randbytes(block_bytes), np.uint8)
        memory.blocks[0][:, 0] = np.arange(num_blocks) % 251
        async with (
            KVSender(memory, layout_fingerprint=LAYOUT, checksum=True) as checking,
            KVSender(memory, layout_fingerprint=LAYOUT, checksum=False) as trusting,
        ):
            senders = {True: checking, False: trusting}
            server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(_InlineServicer(checking, num_blocks), server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            _answer({"grpc": f"127.0.0.1:{port}"})
            while command := await _next_line():
                if command["do"] == "push":
                    await _push(senders[command["checksum"]], command)
                elif command["do"] == "bare tcp":
                    await asyncio.to_thread(_bare_tcp, memory, command)
                else:
                    await asyncio.to_thread(_reference, command["do"], memory, other)
            await server.stop(0)


async def _push(sender: KVSender, command: dict[str, Any]) -> None:
    told = command["endpoint"]
    regions = tuple(KVRegion(*region) for region in told["regions"])
    endpoint = KVEndpoint(**told | {"access_key": bytes.fromhex(told["access_key"]), "regions": regions})
    transfer = await sender.open(bytes.fromhex(command["transfer_id"]), endpoint, command["block_ids"])

    _answer({})
    await _next_line()
    started = time.perf_counter()
    await transfer.send(list(enumerate(command["source_ids"])))
    await transfer.finish()
    _answer({"seconds": time.perf_counter() - started})


def _bare_tcp(memory: KVMemory, command: dict[str, Any]) -> None:
    """What a Python program gets from TCP when it does nothing else."""
    with socket.create_connection(("127.0.0.1", command["port"])) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _answer({})
        sys.stdin.readline()
        started = time.perf_counter()
        for block_id in command["source_ids"]:
            sock.sendall(memory.block(block_id))
        _answer({"seconds": time.perf_counter() - started})


def _reference(name: str, memory: KVMemory, other: KVMemory) -> None:
    _answer({})
    sys.stdin.readline()
    started = time.perf_counter()
    if name == "memcpy":
        np.copyto(other.blocks[0], memory.blocks[0])
    elif name == "memcpy by block":
        for block_id in range(memory.num_blocks):
            np.copyto(other.blocks[0][block_id], memory.blocks[0][block_id])
    else:
        for block_id in range(memory.num_blocks):
            block_checksum(memory.block(block_id))
    _answer({"seconds": time.perf_counter() - started})


class _InlineServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Answers a prefill with the blocks alone, as the grpc transport sends them."""

    def __init__(self, sender: KVSender, num_blocks: int) -> None:
        self._sender = sender
        self._num_blocks = num_blocks

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> AsyncIterator[prefill_pb2.PrefillEvent]:  # noqa: N802
        grant, target = request.grant, request.grant.endpoint
        endpoint = convert.endpoint_from_proto(target)
        block_ids = np.frombuffer(grant.block_ids, "<u4").tolist()
        transfer = await self._sender.open(grant.transfer_id, endpoint, block_ids)
        for index in range(len(block_ids)):
            for block in await transfer.send([(index, index)]):
                yield prefill_pb2.PrefillEvent(block=prefill_pb2.KVBlock(index=block.index, data=block.data, checksum=block.checksum))
        await transfer.finish()


async def _next_line() -> dict[str, Any]:
    line = await asyncio.to_thread(sys.stdin.readline)
    value: dict[str, Any] = json.loads(line or "{}")
    return value


def _answer(value: dict[str, object]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
