"""`micro frames`: tokens from decode to router in step frames beside one stream per request, and what a token costs the router.

Tokens come out of nowhere (token_source.py), so that nothing but moving them is measured. The router's cost is the processor time of a
real router process, from frame to client, detokenizing included, at a pace at which every token is a message of its own; beside it stands
what the same messages cost a process that only writes them.
"""

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import grpc
import uvloop

from loadtest.micro.figure import Figure
from loadtest.micro.http_client import complete, request_body
from loadtest.micro.processes import START_TIMEOUT_S, Service, free_port, service, wait_for_workers
from protos.baton.v1 import common_pb2, decode_pb2, inference_pb2, inference_pb2_grpc
from services.mesh import convert
from services.mesh.child_process import bound_to_parent
from services.mesh.client import open_channel
from services.router.decode_session import DecodeSession, RequestStream

REQUESTS = 64
MODEL = "tokens"
FRAME_TOKENS = 4_000  # of each request, in frames
STREAM_TOKENS = 400  # of each request, one by one
PACED_TOKENS = 150
# A step as long as this leaves a router on half of a shared core time to send every token by itself.
PACE_MS = 25


def measure(*, runs: int) -> tuple[list[Figure], dict[str, object]]:
    """Both figures, and their conditions."""
    return uvloop.run(_measure(runs)), {"requests": REQUESTS, "grpcio": grpc.__version__, "cores": os.cpu_count()}


async def _measure(runs: int) -> list[Figure]:
    frames, streams, cpu, bare_cpu, http_cpu, tokens_per_message = [], [], [], [], [], []
    http_address = f"127.0.0.1:{free_port()}"
    settings = {"http_listen": http_address, "served_model_name": MODEL}
    with _source(0) as fast, _source(PACE_MS) as paced, service("router", workers=f"decode={paced.address}", **settings) as router:
        await wait_for_workers(router.address, 1)
        for _ in range(runs):
            frames.append(await _through_frames(fast.address))
            streams.append(await _through_streams(fast.address))
            seconds, messages = await _cost(router)
            cpu.append(seconds / (REQUESTS * PACED_TOKENS) * 1e6)
            tokens_per_message.append(REQUESTS * PACED_TOKENS / messages)
            seconds, _ = await _cost(paced)
            bare_cpu.append(seconds / (REQUESTS * PACED_TOKENS) * 1e6)
            http_cpu.append(await _http_cost(router, http_address) / (REQUESTS * PACED_TOKENS) * 1e6)
    return [
        Figure(
            name="decode → router in step frames",
            value=statistics.median(frames),
            unit="tokens/s",
            runs=runs,
            reference=statistics.median(streams),
            reference_name="one stream per request",
            target=10.0,
        ),
        Figure(
            name="router's processor time per token to clients",
            value=statistics.median(cpu),
            unit="µs",
            runs=runs,
            reference=statistics.median(bare_cpu),
            reference_name="a server that only writes them",
            target=60.0,
            at_most=True,
            on_ratio=False,
        ),
        Figure(
            name="router's processor time per token to clients over HTTP",
            value=statistics.median(http_cpu),
            unit="µs",
            runs=runs,
            target=60.0,
            at_most=True,
            on_ratio=False,
        ),
        Figure(name="tokens per message to clients", value=statistics.median(tokens_per_message), unit="", runs=runs, on_ratio=False),
    ]


def _cannot_be() -> None:
    raise AssertionError("a reader of this benchmark was too slow")


async def _through_frames(address: str) -> float:
    """Tokens/s from the source to 64 readers behind one session."""
    up = asyncio.Event()
    session = DecodeSession(address, router_id="micro", on_welcome=lambda _: up.set(), on_load=lambda _: None, on_lost=lambda: None)

    async def read(stream: RequestStream) -> int:
        count = 0
        while True:
            for arrival in await stream.next_arrivals():
                count += len(arrival.token_ids)
                if arrival.finish_reason is not None:
                    return count

    running = asyncio.ensure_future(session.run())
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            await up.wait()
        started = time.perf_counter()
        readers = []
        for _ in range(REQUESTS):
            stream = RequestStream([1], on_slow_reader=_cannot_be)
            start = decode_pb2.Start(token_ids=convert.token_ids_to_proto([1]), sampling=common_pb2.SamplingParams(max_tokens=FRAME_TOKENS))
            session.start(start, stream, [0])
            readers.append(read(stream))
        count = sum(await asyncio.gather(*readers))
        seconds = time.perf_counter() - started
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert count == REQUESTS * FRAME_TOKENS
    return count / seconds


async def _through_streams(address: str) -> float:
    """Tokens/s from the same source through 64 streams of single tokens."""
    async with open_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def read() -> int:
            request = inference_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(max_tokens=STREAM_TOKENS))
            return sum([len(response.token_ids.packed) // 4 async for response in stub.Generate(request)])

        started = time.perf_counter()
        count = sum(await asyncio.gather(*(read() for _ in range(REQUESTS))))
        seconds = time.perf_counter() - started
    assert count == REQUESTS * STREAM_TOKENS
    return count / seconds


async def _cost(server: Service) -> tuple[float, int]:
    """Processor seconds of a server for 64 clients' streams, and in how many messages the tokens came."""
    async with open_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def read() -> tuple[int, int]:
            request = inference_pb2.GenerateRequest(
                prompt=inference_pb2.Prompt(token_ids=convert.token_ids_to_proto([300])),
                sampling=common_pb2.SamplingParams(max_tokens=PACED_TOKENS),
            )
            sizes = [len(response.token_ids.packed) // 4 async for response in stub.Generate(request)]
            return sum(sizes), sum(size > 0 for size in sizes)

        before = server.processor_s()
        results = await asyncio.gather(*(read() for _ in range(REQUESTS)))
        seconds = server.processor_s() - before
    assert sum(count for count, _ in results) == REQUESTS * PACED_TOKENS
    return seconds, sum(messages for _, messages in results)


async def _http_cost(router: Service, address: str) -> float:
    """Processor seconds of the router for 64 clients' event streams, each token an event of its own."""
    body = request_body([300], PACED_TOKENS, model=MODEL)
    before = router.processor_s()
    replies = await asyncio.gather(*(complete(address, body) for _ in range(REQUESTS)))
    seconds = router.processor_s() - before
    assert all(reply.tokens == len(reply.token_times) == PACED_TOKENS for reply in replies), replies[0]
    return seconds


@contextlib.contextmanager
def _source(step_ms: int) -> Iterator[Service]:
    command = bound_to_parent([sys.executable, "-m", "loadtest.micro.token_source", str(step_ms)])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield Service(address=process.stdout.readline().strip(), pid=process.pid)
        finally:
            process.kill()
