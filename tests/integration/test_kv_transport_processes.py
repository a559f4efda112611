"""The KV data plane between two processes: what the kernel does for it when the sender is killed or frozen in the middle of a transfer.

This file is also the sender's program: transfer after transfer, it sends block after block of its pool, as it is told.
"""

import asyncio
import dataclasses
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.core.errors import PeerUnavailable, TransferFenced
from services.mesh.kv_transport import IncomingTransfer, KVEndpoint, KVMemory, KVReceiver, KVRegion, KVSender

ROOT = Path(__file__).parents[2]
LAYOUT = b"two processes"
NUM_BLOCKS, BLOCK_BYTES = 256, 1 << 20
DEADLINE_S = 60.0


def pattern(block_id: int) -> bytes:
    return bytes([1 + block_id % 255]) * BLOCK_BYTES


@asynccontextmanager
async def sending_process() -> AsyncIterator[asyncio.subprocess.Process]:
    """Bounded, and gone afterwards whatever state it is in."""
    async with asyncio.timeout(DEADLINE_S):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            # Lets the transports of its pipes notice that it is gone.
            await process.communicate()


async def order(process: asyncio.subprocess.Process, endpoint: KVEndpoint, transfer: IncomingTransfer, *, hold_back: int = 0) -> None:
    """Tells the sender to fill a transfer, but for its last `hold_back` blocks: then it cannot be complete, however slow this test is."""
    command = {
        "endpoint": dataclasses.asdict(endpoint) | {"access_key": endpoint.access_key.hex()},
        "transfer_id": transfer.transfer_id.hex(),
        "block_ids": transfer.block_ids,
        "hold_back": hold_back,
    }
    assert process.stdin
    process.stdin.write(json.dumps(command).encode() + b"\n")
    await process.stdin.drain()


async def begin(process: asyncio.subprocess.Process, receiver: KVReceiver) -> IncomingTransfer:
    """A transfer of the whole pool, some blocks after its start; it will never be complete."""
    transfer = receiver.grant(range(NUM_BLOCKS))
    await order(process, receiver.endpoint, transfer, hold_back=1)
    while transfer.num_landed < 3:  # noqa: ASYNC110 (threads count it)
        await asyncio.sleep(0)
    return transfer


async def freeze(process: asyncio.subprocess.Process) -> None:
    """Returns when every one of its threads stands still: they do not all at once."""
    process.send_signal(signal.SIGSTOP)
    while thread_states(process.pid) != {"T"}:  # noqa: ASYNC110 (the kernel does it)
        await asyncio.sleep(0.001)


def thread_states(pid: int) -> set[str]:
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")}


def exact_blocks(memory: KVMemory, block_ids: tuple[int, ...]) -> int:
    return sum(memory.block(block_id) == pattern(index) for index, block_id in enumerate(block_ids))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_transfer_when_between_processes_lands_exactly(transport: str) -> None:
    async def main() -> None:
        with KVMemory([(NUM_BLOCKS, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, transports=[transport]) as receiver, sending_process() as process:
                transfer = receiver.grant(range(10, 40))
                await order(process, receiver.endpoint, transfer)
                await transfer.wait_landed()
                assert exact_blocks(target, transfer.block_ids) == 30
                assert not target.blocks[0][:10].any() and not target.blocks[0][40:].any()

    asyncio.run(main())


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_transfer_when_its_sender_is_killed_fails_and_is_fenced_at_once(transport: str) -> None:
    async def main() -> None:
        with KVMemory([(NUM_BLOCKS, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, transports=[transport]) as receiver, sending_process() as process:
                transfer = await begin(process, receiver)
                process.kill()
                with pytest.raises(PeerUnavailable):
                    await transfer.wait_landed()
                assert await transfer.fence(DEADLINE_S)
                assert exact_blocks(target, transfer.block_ids) >= transfer.num_landed >= 3
                target.buffer[:] = bytes(target.pool_bytes)  # it is all ours again
                await process.wait()
                await asyncio.sleep(0.05)
                assert not target.blocks[0].any()

    asyncio.run(main())


def test_shm_transfer_when_its_sender_is_frozen_stays_in_quarantine_until_it_thaws() -> None:
    async def main() -> None:
        with KVMemory([(NUM_BLOCKS, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, transports=["shm"]) as receiver, sending_process() as process:
                transfer = await begin(process, receiver)
                await freeze(process)
                assert not await transfer.fence(0.1)
                async with asyncio.TaskGroup() as tasks:
                    waiting = tasks.create_task(transfer.wait_fenced())
                    await asyncio.sleep(0.05)
                    assert not waiting.done()
                    process.send_signal(signal.SIGCONT)
                assert transfer.is_fenced
                target.buffer[:] = bytes(target.pool_bytes)
                # The sender lives on: the next transfer of the same connection lands, and nothing of the first one does.
                again = receiver.grant([7])
                await order(process, receiver.endpoint, again)
                await again.wait_landed()
                assert exact_blocks(target, again.block_ids) == 1
                target.block(7)[:] = bytes(BLOCK_BYTES)
                assert not target.blocks[0].any()

    asyncio.run(main())


def test_shm_transfer_when_its_frozen_sender_is_killed_is_fenced() -> None:
    async def main() -> None:
        with KVMemory([(NUM_BLOCKS, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, transports=["shm"]) as receiver, sending_process() as process:
                transfer = await begin(process, receiver)
                await freeze(process)
                assert not await transfer.fence(0.05)
                process.kill()
                await transfer.wait_fenced()

    asyncio.run(main())


def test_tcp_transfer_when_its_sender_is_frozen_is_fenced_by_the_receiver_alone() -> None:
    async def main() -> None:
        with KVMemory([(NUM_BLOCKS, BLOCK_BYTES)]) as target:
            async with KVReceiver(target, layout_fingerprint=LAYOUT, transports=["tcp"]) as receiver, sending_process() as process:
                transfer = await begin(process, receiver)
                await freeze(process)
                assert await transfer.fence(0.1)
                target.buffer[:] = bytes(target.pool_bytes)
                process.send_signal(signal.SIGCONT)
                again = receiver.grant([7])
                await order(process, receiver.endpoint, again)
                await again.wait_landed()
                target.block(7)[:] = bytes(BLOCK_BYTES)
                assert not target.blocks[0].any()

    asyncio.run(main())


async def _serve_orders() -> None:
    with KVMemory([(NUM_BLOCKS, BLOCK_BYTES)]) as source:
        source.blocks[0][:] = np.array([pattern(block_id)[0] for block_id in range(NUM_BLOCKS)], np.uint8)[:, None]
        async with KVSender(source, layout_fingerprint=LAYOUT) as sender:
            while line := await asyncio.to_thread(sys.stdin.readline):
                await _obey(sender, json.loads(line))


async def _obey(sender: KVSender, command: dict[str, Any]) -> None:
    told = command["endpoint"]
    regions = tuple(KVRegion(*region) for region in told["regions"])
    endpoint = KVEndpoint(**told | {"access_key": bytes.fromhex(told["access_key"]), "regions": regions})
    block_ids = command["block_ids"]
    for attempt in range(2):
        try:
            transfer = await sender.open(bytes.fromhex(command["transfer_id"]), endpoint, block_ids)
        except PeerUnavailable:
            if attempt:
                raise
            continue  # the connection that the receiver had cut off
        break
    try:
        for index in range(len(block_ids) - command["hold_back"]):
            await transfer.send([(index, index)])
        if not command["hold_back"]:
            await transfer.finish()
    except (TransferFenced, PeerUnavailable) as error:
        print(f"the transfer was ended: {error}", file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(_serve_orders())
