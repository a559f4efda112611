"""`micro index`: what the KV index costs, as a process over a real Redis, with a router's replica in another process listening."""

import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import grpc
import uvloop

from loadtest.micro.figure import Figure
from loadtest.micro.index_replica import STAMPED
from loadtest.micro.processes import START_TIMEOUT_S, health_check_ms, service
from protos.baton.v1 import common_pb2, kv_index_pb2, kv_index_pb2_grpc
from services.mesh.child_process import bound_to_parent
from services.mesh.client import open_channel
from services.mesh.index_client import IndexPublisher
from services.mesh.redis_server import RedisServer
from services.mesh.redis_store import RedisStore, Script, ScriptCall

PROMPT_BLOCKS = 64
WORKERS = 32
WORKER_BLOCKS = 2_000
CALLS = 500
STAMPED_EVENTS = 100
PACE_S = 0.01
STREAMS = 8
STREAM_EVENTS = 500
EVENT_BLOCKS = 32  # half of them stored, half removed, as of a pool that is full
_PIPELINE = 256

# What absorbing an event cannot do without, by itself.
_SADD = Script("""
local function split(packed)
  local hashes = {}
  for at = 1, #packed, 16 do hashes[#hashes + 1] = string.sub(packed, at, at + 15) end
  return hashes
end
redis.call('SREM', KEYS[1], unpack(split(ARGV[1])))
redis.call('SADD', KEYS[1], unpack(split(ARGV[2])))
""")


def measure(*, runs: int) -> tuple[list[Figure], dict[str, object]]:
    """All figures, and their conditions."""
    conditions: dict[str, object] = {
        "workers": WORKERS,
        "blocks per worker": WORKER_BLOCKS,
        "blocks per event": EVENT_BLOCKS,
        "grpcio": grpc.__version__,
        "cores": os.cpu_count(),
    }
    with RedisServer() as redis, service("kv_index", redis_url=redis.url) as index:
        return uvloop.run(_measure(redis, index.address, runs)), conditions


async def _measure(redis: RedisServer, address: str, runs: int) -> list[Figure]:
    matches, echoes, delays, absorbed, scripts = [], [], [], [], []
    async with open_channel(address) as channel, RedisStore(redis.url) as store, contextlib.AsyncExitStack() as stack:
        async with asyncio.timeout(START_TIMEOUT_S):
            await channel.channel_ready()
        prompt = _hashes("prompt", PROMPT_BLOCKS)
        for number in range(WORKERS):
            worker = await stack.enter_async_context(IndexPublisher([address], worker_id=f"w{number}", epoch=1))
            # Every eighth worker holds a part of the prompt: half of it, or more.
            held = prompt[: PROMPT_BLOCKS // 2 + number] if number % 8 == 0 else []
            worker.publish_nowait(stored=held + _hashes(f"w{number}", WORKER_BLOCKS))
            await _wait_acknowledged(worker)
        stamped = await stack.enter_async_context(IndexPublisher([address], worker_id=STAMPED, epoch=1))
        await _wait_acknowledged(stamped)
        epochs = itertools.count(1)
        for _ in range(runs):
            matches.append(await _match_ms(channel, prompt))
            echoes.append(await health_check_ms(address, CALLS))
            with _replica(address) as replica:
                await _publish_stamped(stamped)
                epoch = next(epochs)
                absorbed.append(await _absorbed_per_s(address, epoch))
                delays.append(_median_delay_ms(replica))
            scripts.append(await _scripts_per_s(store))
    return [
        Figure(
            name=f"Match of {PROMPT_BLOCKS} blocks through the service, p50",
            value=statistics.median(matches),
            unit="ms",
            runs=runs,
            reference=statistics.median(echoes),
            reference_name="health check of the same process",
            target=1.0,
            at_most=True,
            on_ratio=False,
        ),
        Figure(
            name="event published → in a router's replica, p50",
            value=statistics.median(delays),
            unit="ms",
            runs=runs,
            target=10.0,
            at_most=True,
            on_ratio=False,
        ),
        Figure(
            name="block events absorbed (in Redis, acknowledged)",
            value=statistics.median(absorbed),
            unit="blocks/s",
            runs=runs,
            reference=statistics.median(scripts),
            reference_name="the same sets changed in Redis, nothing else",
            target=50_000.0,
            on_ratio=False,
        ),
    ]


async def _match_ms(channel: grpc.aio.Channel, prompt: Sequence[bytes]) -> float:
    stub = kv_index_pb2_grpc.KVIndexServiceStub(channel)
    request = kv_index_pb2.MatchRequest(hashes=b"".join(prompt))
    response = await stub.Match(request, timeout=5)
    assert response.matches[0].num_blocks > PROMPT_BLOCKS // 2, "the longest match is missing"
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        await stub.Match(request, timeout=5)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


@contextlib.contextmanager
def _replica(address: str) -> Iterator[subprocess.Popen[str]]:
    command = bound_to_parent([sys.executable, "-m", "loadtest.micro.index_replica", address])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "synchronized\n"
            yield process
        finally:
            process.kill()


async def _publish_stamped(worker: IndexPublisher) -> None:
    """Small events, one after the other."""
    held: list[bytes] = []
    for number in range(STAMPED_EVENTS):
        stamp = time.monotonic_ns().to_bytes(8, "big")
        stored = [stamp + (number * EVENT_BLOCKS + block).to_bytes(8, "big") for block in range(EVENT_BLOCKS // 2)]
        worker.publish_nowait(stored=stored, removed=held)
        held = stored
        await asyncio.sleep(PACE_S)
    await _wait_acknowledged(worker)


def _median_delay_ms(replica: subprocess.Popen[str]) -> float:
    output, _ = replica.communicate(input="")
    delays_ns: list[int] = json.loads(output)
    assert delays_ns, "the replica heard nothing"
    return statistics.median(delays_ns) / 1e6


async def _absorbed_per_s(address: str, epoch: int) -> float:
    """Blocks per second through several streams, from the first event until the last acknowledgement."""
    async with open_channel(address) as channel:
        calls = [kv_index_pb2_grpc.KVIndexServiceStub(channel).Publish() for _ in range(STREAMS)]
        events = [_events(f"s{number}", epoch) for number in range(STREAMS)]
        for call, [first, *_] in zip(calls, events, strict=True):
            await call.write(first)
            await _read_until(call, 1)
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for call, [_, *rest] in zip(calls, events, strict=True):
                group.create_task(_write_all(call, rest))
                group.create_task(_read_until(call, STREAM_EVENTS + 1))
        seconds = time.perf_counter() - started
        for call in calls:
            call.cancel()
    return STREAMS * STREAM_EVENTS * EVENT_BLOCKS / seconds


def _events(worker_id: str, epoch: int) -> list[kv_index_pb2.PublishRequest]:
    """An empty snapshot, then events of a pool that is full."""
    worker = common_pb2.WorkerId(worker_id=worker_id, epoch=epoch)
    step = EVENT_BLOCKS // 2
    hashes = _hashes(f"{worker_id}/{epoch}", step * (STREAM_EVENTS + 1))
    parts = [b"".join(hashes[start : start + step]) for start in range(0, len(hashes), step)]
    events = [kv_index_pb2.BlockEvent(worker=worker, sequence_number=1, snapshot=True, stored=parts[0])]
    for number, (removed, stored) in enumerate(itertools.pairwise(parts), 2):
        events.append(kv_index_pb2.BlockEvent(worker=worker, sequence_number=number, removed=removed, stored=stored))
    return [kv_index_pb2.PublishRequest(event=event) for event in events]


async def _write_all(call: Any, requests: Sequence[kv_index_pb2.PublishRequest]) -> None:
    for request in requests:
        await call.write(request)


async def _read_until(call: Any, sequence_number: int) -> None:
    while (response := await call.read()).sequence_number < sequence_number:
        assert not response.need_snapshot, "the index lost an event"


async def _scripts_per_s(store: RedisStore) -> float:
    """Blocks per second when Redis alone is asked to change the same sets, one small script for each event, many in a round trip."""
    calls = [
        ScriptCall(script=_SADD, keys=[f"reference:{number}"], args=[request.event.removed, request.event.stored])
        for number in range(STREAMS)
        for request in _events(f"s{number}", 1)[1:]
    ]
    await store.run(calls[:1])
    started = time.perf_counter()
    for start in range(0, len(calls), _PIPELINE):
        await store.run(calls[start : start + _PIPELINE])
    return len(calls) * EVENT_BLOCKS / (time.perf_counter() - started)


async def _wait_acknowledged(worker: IndexPublisher) -> None:
    async with asyncio.timeout(START_TIMEOUT_S):
        await worker.wait_acknowledged()


def _hashes(name: str, count: int) -> list[bytes]:
    return [blake2b(f"{name}/{block}".encode(), digest_size=16).digest() for block in range(count)]
