"""A mesh inside one test: the real processes' own serve() as tasks of this event loop, over loopback, with counters at hand.

Routers list their workers in a setting, so that a test decides who may serve whom.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from protos.baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc, status_pb2, status_pb2_grpc
from services.core.types import FinishReason, SamplingParams
from services.decode.process import serve as serve_decode
from services.mesh import convert
from services.mesh.child_process import bound_to_parent
from services.mesh.client import open_channel
from services.prefill.process import serve as serve_prefill
from services.router.process import serve as serve_router
from services.router.settings import NO_HTTP, RouterSettings
from services.worker.settings import WorkerSettings

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Reply:
    """What a client got for one request, by choice."""

    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[list[common_pb2.TokenLogprobs]] = field(default_factory=list)
    finish_reasons: list[FinishReason | None] = field(default_factory=list)
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    timing: inference_pb2.RequestTiming = field(default_factory=inference_pb2.RequestTiming)


class Mesh:
    """`async with Mesh(model) as mesh`: starts services, stops them all at the end. `model` is a checkpoint directory."""

    def __init__(self, model: str | Path, **worker_settings: Any) -> None:
        self._worker_settings = {"model": str(model), "block_size": 16, "kv_memory_bytes": 1 << 24, **worker_settings}
        self._running: dict[str, tuple[asyncio.Event, asyncio.Task[None]]] = {}  # by worker_id, or a router's address
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._processes: list[asyncio.subprocess.Process] = []
        self._http: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self._tasks = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for channel in self._channels.values():
            await channel.close()
        for process in self._processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
        for stop, _ in self._running.values():
            stop.set()
        await self._tasks.__aexit__(kind, error, traceback)

    async def prefill(self, worker_id: str, **settings: Any) -> str:
        """Starts a prefill worker; returns how a router's setting lists it."""
        return await self._worker("prefill", worker_id, serve_prefill, settings)

    async def decode(self, worker_id: str, **settings: Any) -> str:
        """Starts a decode worker; returns how a router's setting lists it."""
        return await self._worker("decode", worker_id, serve_decode, settings)

    async def spawn_decode(self, worker_id: str, *, address: str | None = None) -> tuple[str, asyncio.subprocess.Process]:
        """Starts a decode worker as a process of its own, to be killed; returns how a router's setting lists it, and the process."""
        address = address or f"127.0.0.1:{free_port()}"
        values = {**self._worker_settings, "listen": address, "worker_id": worker_id, "log_level": "WARNING"}
        settings = {f"BATON_{name.upper()}": ",".join(value) if isinstance(value, tuple) else str(value) for name, value in values.items()}
        environment = {**{name: value for name, value in os.environ.items() if not name.startswith("BATON_")}, **settings}
        command = bound_to_parent([sys.executable, "-m", "services.decode"])
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment)
        self._processes.append(process)
        return f"decode={worker_id}@{address}", process

    async def stop(self, worker_id: str) -> None:
        """Stops a worker as SIGTERM would, and waits for its end."""
        stop, task = self._running.pop(worker_id)
        stop.set()
        await task

    async def router(self, workers: Sequence[str], **settings: Any) -> str:
        """Starts a router over these workers and waits until it can use them all; returns its address."""
        address = self.router_over(workers, **settings)
        await self.wait_for(address, lambda status: sum(worker.state == "up" for worker in status.workers) == len(workers))
        return address

    def router_over(self, workers: Sequence[str], *, http: bool = False, **settings: Any) -> str:
        """Starts a router over these workers; returns its address. `http`: it serves HTTP, too, at http_address()."""
        address = f"127.0.0.1:{free_port()}"
        self._http[address] = f"127.0.0.1:{free_port()}" if http else NO_HTTP
        self._start(
            address, serve_router, RouterSettings(listen=address, http_listen=self._http[address], workers=tuple(workers), **settings)
        )
        return address

    def http_address(self, router: str) -> str:
        """Where a router that was started with `http` serves HTTP."""
        address = self._http[router]
        assert address != NO_HTTP
        return address

    async def generate(self, router: str, prompt: Sequence[int] | str, sampling: SamplingParams, **fields: Any) -> Reply:
        """One request, to its end."""
        kind = {"text": prompt} if isinstance(prompt, str) else {"token_ids": convert.token_ids_to_proto(prompt)}
        request = inference_pb2.GenerateRequest(
            prompt=inference_pb2.Prompt(**kind),
            sampling=convert.sampling_to_proto(sampling),
            include_timing=True,
            **fields,
        )
        reply = Reply(
            tokens=[[] for _ in range(sampling.n)],
            texts=[""] * sampling.n,
            logprobs=[[] for _ in range(sampling.n)],
            finish_reasons=[None] * sampling.n,
        )
        async for response in self.stub(router).Generate(request):
            choice = response.choice
            assert reply.finish_reasons[choice] is None or response.HasField("usage"), "tokens after the end"
            reply.tokens[choice] += convert.unpack_u32(response.token_ids.packed)
            reply.texts[choice] += response.text
            reply.logprobs[choice] += response.logprobs
            reply.finish_reasons[choice] = convert.finish_reason_from_proto(response.finish_reason) or reply.finish_reasons[choice]
            if response.HasField("usage"):
                reply.usage, reply.timing = response.usage, response.timing
        return reply

    def stub(self, router: str) -> inference_pb2_grpc.InferenceServiceStub:
        return inference_pb2_grpc.InferenceServiceStub(self.channel(router))

    def channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]

    async def status(self, router: str) -> status_pb2.WatchStatusResponse:
        """What a router sees now."""
        call = status_pb2_grpc.StatusServiceStub(self.channel(router)).WatchStatus(status_pb2.WatchStatusRequest())
        try:
            response: status_pb2.WatchStatusResponse = await call.read()
            return response
        finally:
            call.cancel()

    async def loads(self, router: str) -> dict[str, common_pb2.WorkerLoad]:
        """Each worker's books once nothing runs there any more."""

        def is_quiet(status: status_pb2.WatchStatusResponse) -> bool:
            return all(worker.load.num_running + worker.load.num_waiting + worker.load.blocks_owned == 0 for worker in status.workers)

        status = await self.wait_for(router, is_quiet)
        return {worker.worker.worker_id: worker.load for worker in status.workers}

    async def wait_for(self, router: str, condition: Callable[[status_pb2.WatchStatusResponse], bool]) -> status_pb2.WatchStatusResponse:
        """The first status of which the condition holds."""
        last: status_pb2.WatchStatusResponse | None = None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while True:
                    with contextlib.suppress(grpc.aio.AioRpcError):  # it may not listen yet
                        last = await self.status(router)
                        if condition(last):
                            return last
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"never came true: {last}") from None

    async def _worker(self, role: str, worker_id: str, serve: Callable[..., Coroutine[Any, Any, None]], settings: dict[str, Any]) -> str:
        address = settings.pop("address", f"127.0.0.1:{free_port()}")
        values = {**self._worker_settings, **settings, "listen": address, "worker_id": worker_id}
        self._start(worker_id, serve, WorkerSettings(**values))
        return f"{role}={worker_id}@{address}"

    def _start(self, name: str, serve: Callable[..., Coroutine[Any, Any, None]], settings: Any) -> None:
        stop = asyncio.Event()
        self._running[name] = stop, self._tasks.create_task(serve(settings, stop))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
