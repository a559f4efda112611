"""A real MeshServer on a free port, whose handlers a test gives, and a channel to it."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from protos.baton.v1 import decode_pb2_grpc, inference_pb2_grpc
from services.mesh.client import open_channel
from services.mesh.server import MeshServer

SERVICES = ("baton.v1.InferenceService", "baton.v1.DecodeService")


@contextlib.asynccontextmanager
async def serving(
    *,
    tokenize: Callable[[Any, Any], Any] | None = None,
    generate: Callable[[Any, Any], Any] | None = None,
    session: Callable[[Any, Any], Any] | None = None,
    **options: Any,
) -> AsyncIterator[tuple[MeshServer, grpc.aio.Channel]]:
    """`tokenize` answers once, `generate` streams, `session` streams both ways; `options` are the server's.

    The server stops first, so that calls still open end as they do when a process goes away.
    """
    inference: Any = inference_pb2_grpc.InferenceServiceServicer()
    inference.Tokenize, inference.Generate = tokenize, generate
    decode: Any = decode_pb2_grpc.DecodeServiceServicer()
    decode.Session = session

    def register(server: grpc.aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(decode, server)

    server = MeshServer("127.0.0.1:0", register, services=SERVICES, **options)
    async with open_channel(server.address) as channel, server:
        yield server, channel
