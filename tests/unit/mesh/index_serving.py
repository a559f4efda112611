"""A real KVIndexService on a free port, without Redis, that may lose events on purpose."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from protos.baton.v1 import kv_index_pb2, kv_index_pb2_grpc
from services.kv_index.keeper import Keeper
from services.kv_index.service import SERVICE_NAME, KVIndexServicer
from services.mesh.server import MeshServer


class LossyServicer(KVIndexServicer):
    """Asks `keep_published` and `keep_watched` of every event on its way, and loses those that they refuse."""

    def __init__(self, keeper: Keeper) -> None:
        super().__init__(keeper)
        self.keeper = keeper
        self.address = ""
        self.keep_published: Callable[[kv_index_pb2.BlockEvent], bool] = lambda event: True
        self.keep_watched: Callable[[kv_index_pb2.BlockEvent], bool] = lambda event: True
        self.num_watches = 0

    async def Publish(  # noqa: N802 (the proto's name)
        self, requests: AsyncIterator[kv_index_pb2.PublishRequest], context: Any
    ) -> AsyncIterator[kv_index_pb2.PublishResponse]:
        async def kept() -> AsyncIterator[kv_index_pb2.PublishRequest]:
            async for request in requests:
                if self.keep_published(request.event):
                    yield request

        async for response in super().Publish(kept(), context):
            yield response

    async def Watch(  # noqa: N802
        self, request: kv_index_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[kv_index_pb2.WatchResponse]:
        self.num_watches += 1
        async for response in super().Watch(request, context):
            events = [event for event in response.events if self.keep_watched(event)]
            yield kv_index_pb2.WatchResponse(events=events, synchronized=response.synchronized)


@contextlib.asynccontextmanager
async def serving_index(*, lease_s: float = 10.0, listen: str = "127.0.0.1:0", runs: bool = True) -> AsyncIterator[LossyServicer]:
    """The servicer, its `address` filled in. Unless it `runs` it stands by for ever."""
    servicer = LossyServicer(Keeper(lease_s=lease_s, watch_buffer_bytes=1 << 20))

    def register(server: grpc.aio.Server) -> None:
        kv_index_pb2_grpc.add_KVIndexServiceServicer_to_server(servicer, server)

    async with MeshServer(listen, register, services=[SERVICE_NAME]) as server:
        servicer.address = server.address
        keeping = asyncio.create_task(servicer.keeper.run(None)) if runs else None
        await asyncio.sleep(0)
        try:
            yield servicer
        finally:
            if keeping is not None:
                keeping.cancel()
                await asyncio.wait((keeping,))


def first_event_lost(condition: Callable[[kv_index_pb2.BlockEvent], bool]) -> Callable[[kv_index_pb2.BlockEvent], bool]:
    """Refuses one event, the first for which `condition` holds."""
    lost: list[kv_index_pb2.BlockEvent] = []

    def keep(event: kv_index_pb2.BlockEvent) -> bool:
        if not lost and condition(event):
            lost.append(event)
            return False
        return True

    return keep
