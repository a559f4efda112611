"""Asks whether processes of a mesh are there: gRPC health, Redis' PING, and whom a router can use. Never raises for one that is not."""

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.baton.v1 import status_pb2, status_pb2_grpc
from services.core.errors import Incompatible
from services.mesh.client import open_channel

PROBE_TIMEOUT_S = 2.0
STATUS_INTERVAL_S = 0.2
_RETRY_S = 0.1


def grpc_probe(address: str) -> Callable[[], Coroutine[Any, Any, bool]]:
    """Whether a gRPC server says SERVING. A channel for each question: one that failed to connect would wait before it tries again."""

    async def is_serving() -> bool:
        async with open_channel(address) as channel:
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return is_serving


def redis_probe(host: str, port: int) -> Callable[[], Coroutine[Any, Any, bool]]:
    """Whether a Redis answers."""

    async def is_serving() -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    writer.write(b"PING\r\n")
                    return await reader.readline() == b"+PONG\r\n"
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False

    return is_serving


async def wait_workers_up(router: str, worker_ids: Collection[str], report: Callable[[str, str], None]) -> None:
    """Returns when the router can use all these workers; reports each change of a worker's state on the way.

    Raises Incompatible when the router says that it never will use one of them.
    """
    reported: dict[str, str] = {}
    async with open_channel(router) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        while True:
            call = stub.WatchStatus(status_pb2.WatchStatusRequest(interval_s=STATUS_INTERVAL_S))
            try:
                async for response in call:
                    states = {worker.worker.worker_id: worker.state for worker in response.workers if worker.worker.worker_id in worker_ids}
                    for worker_id, state in states.items():
                        if reported.get(worker_id) != state:
                            reported[worker_id] = state
                            report(worker_id, f"{state} at {response.router_id}")
                        if state == "incompatible":
                            raise Incompatible(f"{worker_id} serves another model than the other workers of {response.router_id}")
                    if len(states) == len(worker_ids) and set(states.values()) <= {"up"}:
                        return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(_RETRY_S)
            finally:
                call.cancel()
