"""A decode worker that says what the test wants, behind a real server."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

from protos.baton.v1 import common_pb2, decode_pb2, decode_pb2_grpc
from services.mesh import convert
from services.mesh.server import MeshServer

IDENTITY = common_pb2.ModelIdentity(
    model_name="tiny",
    model_fingerprint=b"m",
    layout_fingerprint=b"l",
    block_size=16,
    block_bytes=1 << 15,
    max_model_len=512,
    vocab_size=400,
)
LOAD = common_pb2.WorkerLoad(blocks_total=100, blocks_free=100, max_num_seqs=8)


class Worker(decode_pb2_grpc.DecodeServiceServicer):
    """Welcomes every session, notes its commands and sends what is put into `frames`; None ends the session."""

    def __init__(self) -> None:
        self.welcome = decode_pb2.SessionWelcome(worker=common_pb2.WorkerId(worker_id="d0", epoch=1), model=IDENTITY)
        self.commands: list[list[decode_pb2.SessionCommand]] = []  # by session, without heartbeats
        self.heartbeats = 0
        self.frames: asyncio.Queue[decode_pb2.StepFrame | None] = asyncio.Queue()

    def first_frames(self) -> list[decode_pb2.StepFrame]:
        return [decode_pb2.StepFrame(hello=self.welcome, load=LOAD)]

    async def Session(  # noqa: N802
        self, commands: AsyncIterator[decode_pb2.SessionCommand], context: Any
    ) -> AsyncGenerator[decode_pb2.StepFrame, None]:
        await anext(aiter(commands))
        heard: list[decode_pb2.SessionCommand] = []
        self.commands.append(heard)

        async def hear() -> None:
            async for command in commands:
                if command.WhichOneof("kind") == "heartbeat":
                    self.heartbeats += 1
                else:
                    heard.append(command)

        for first in self.first_frames():
            yield first
        async with asyncio.TaskGroup() as tasks:
            hearing = tasks.create_task(hear())
            while (frame := await self.frames.get()) is not None:
                yield frame
            hearing.cancel()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Gives the address."""

        def register(server: grpc.aio.Server) -> None:
            decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

        async with MeshServer("127.0.0.1:0", register, services=[]) as server:
            yield server.address


def tokens(handle: int, first_position: int, *token_ids: int) -> decode_pb2.StepFrame:
    return decode_pb2.StepFrame(
        handles=convert.pack_u32([handle] * len(token_ids)),
        positions=convert.pack_u32(range(first_position, first_position + len(token_ids))),
        token_ids=convert.pack_u32(token_ids),
    )
