"""Puts an instance of the index together and runs it until it is told to stop."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator

import grpc

from protos.baton.v1 import kv_index_pb2_grpc
from services.core.errors import PeerUnavailable
from services.kv_index.keeper import OWNER_LEASE_S, Keeper
from services.kv_index.redis_copy import RedisCopy
from services.kv_index.service import SERVICE_NAME, KVIndexServicer
from services.kv_index.settings import KVIndexSettings
from services.mesh.redis_store import RedisStore
from services.mesh.server import MeshServer

_log = logging.getLogger(__name__)


async def serve(settings: KVIndexSettings, stop: asyncio.Event) -> None:
    """Serves until `stop` is set; gives the index up then, so that a standby need not wait for the lease."""
    async with contextlib.AsyncExitStack() as stack:
        keeper = Keeper(lease_s=settings.lease_s, watch_buffer_bytes=settings.watch_buffer_bytes)

        def register(server: grpc.aio.Server) -> None:
            kv_index_pb2_grpc.add_KVIndexServiceServicer_to_server(KVIndexServicer(keeper), server)

        server = await stack.enter_async_context(MeshServer(settings.listen, register, services=[SERVICE_NAME]))
        redis = await stack.enter_async_context(_redis_copy(settings, server.address))
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(keeper.run(redis))
            await server.set_serving(True)
            _log.info("listening", extra={"address": server.address})
            await stop.wait()
            keeping.cancel()


@contextlib.asynccontextmanager
async def _redis_copy(settings: KVIndexSettings, address: str) -> AsyncIterator[RedisCopy | None]:
    if settings.redis_url is None:
        yield None
        return
    async with RedisStore(settings.redis_url) as store:
        redis = RedisCopy(
            store,
            # Whoever listens there now has outlived whoever did before.
            instance=f"{socket.gethostname()}/{address}",
            namespace=settings.namespace,
            lease_s=settings.lease_s,
            owner_lease_s=OWNER_LEASE_S,
        )
        yield redis
        with contextlib.suppress(PeerUnavailable):
            await redis.release()
