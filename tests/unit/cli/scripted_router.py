"""A real gRPC server in a router's place, in the frame of every process (health, errors as statuses), whose answers a test writes down."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protos.baton.v1 import inference_pb2, inference_pb2_grpc, status_pb2, status_pb2_grpc
from services.core.errors import BatonError
from services.mesh.convert import token_ids_to_proto
from services.mesh.server import MeshServer

ROOT = Path(__file__).parents[3]
SERVICES = ("baton.v1.InferenceService", "baton.v1.StatusService")


def piece(text: str, *token_ids: int, choice: int = 0, finish: str = "") -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        choice=choice,
        text=text,
        token_ids=token_ids_to_proto(token_ids),
        finish_reason=f"FINISH_REASON_{finish.upper() or 'UNSPECIFIED'}",
    )


def last(**usage: int) -> inference_pb2.GenerateResponse:
    timing = inference_pb2.RequestTiming(
        request_id="r1",
        router_id="router-0",
        decode_worker_id="decode-0",
        prefill_worker_id="prefill-1",
        seed=42,
        ttft_s=0.01,
        total_s=0.02,
    )
    timing.kv_transport, timing.kv_blocks, timing.kv_bytes, timing.transfer_s = "shm", 3, 3000, 0.001
    return inference_pb2.GenerateResponse(usage=inference_pb2.Usage(**usage), timing=timing)


@dataclass
class ScriptedRouter(inference_pb2_grpc.InferenceServiceServicer, status_pb2_grpc.StatusServiceServicer):
    """Answers Generate with `pieces`, raising those that are errors and awaiting those that can be called; remembers what it was asked.

    A status stream gives `statuses` one after another, ends there if `status_ends`, and else says nothing more.
    """

    pieces: Sequence[inference_pb2.GenerateResponse | BatonError | Callable[[], Awaitable[object]]] = ()
    statuses: Sequence[status_pb2.WatchStatusResponse] = ()
    status_ends: bool = False
    prompt_tokens: int = 3
    max_model_len: int = 4096
    requests: list[Any] = field(default_factory=list)
    deadlines: list[float | None] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def Generate(  # noqa: N802 (the proto's name)
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        try:
            for step in self.pieces:
                if isinstance(step, BatonError):
                    raise step
                if isinstance(step, inference_pb2.GenerateResponse):
                    yield step
                else:
                    await step()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        self.requests.append(request)
        return inference_pb2.TokenizeResponse(token_ids=token_ids_to_proto(range(self.prompt_tokens)), max_model_len=self.max_model_len)

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        self.requests.append(request)
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(name="demo", max_model_len=self.max_model_len)])

    async def WatchStatus(  # noqa: N802
        self, request: status_pb2.WatchStatusRequest, context: Any
    ) -> AsyncIterator[status_pb2.WatchStatusResponse]:
        self.requests.append(request)
        for status in self.statuses:
            yield status
        if self.status_ends:
            return
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def serving(router: ScriptedRouter, listen: str = "127.0.0.1:0") -> AsyncIterator[MeshServer]:
    """Serves, and says so to health."""

    def register(server: Any) -> None:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(router, server)
        status_pb2_grpc.add_StatusServiceServicer_to_server(router, server)

    async with MeshServer(listen, register, services=SERVICES) as server:
        await server.set_serving(True)
        yield server


@dataclass(frozen=True)
class Finished:
    status: int
    out: str
    err: str


async def start_baton(*arguments: str, environment: dict[str, str] | None = None) -> asyncio.subprocess.Process:
    """The command line as a user runs it, in a process of its own."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", *arguments),
        cwd=ROOT,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def baton(*arguments: str, environment: dict[str, str] | None = None) -> Finished:
    process = await start_baton(*arguments, environment=environment)
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(), err.decode())
