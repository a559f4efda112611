"""Puts a prefill worker together and runs it until it is told to stop."""

import asyncio
import contextlib

import grpc

from protos.baton.v1 import prefill_pb2_grpc
from services.mesh.discovery import WorkerRecord
from services.mesh.kv_transport import KVSender
from services.mesh.server import MeshServer
from services.prefill.service import PrefillServicer
from services.worker.runtime import advertised, announced, start_worker
from services.worker.settings import WorkerSettings


async def serve(settings: WorkerSettings, stop: asyncio.Event) -> None:
    """Serves until `stop` is set and what was accepted has ended."""
    async with contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(start_worker(settings, "prefill"))
        sender = await stack.enter_async_context(
            KVSender(worker.memory, layout_fingerprint=worker.identity.layout_fingerprint, transports=settings.kv_transports)
        )
        servicer = PrefillServicer(worker, sender, transports=settings.kv_transports)

        def register(server: grpc.aio.Server) -> None:
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server)

        server = await stack.enter_async_context(
            MeshServer(
                settings.listen,
                register,
                services=["baton.v1.PrefillService"],
                drain_timeout_s=settings.drain_timeout_s,
                returns_request_id=False,
            )
        )
        record = WorkerRecord(
            worker_id=worker.worker_id, epoch=worker.epoch, role="prefill", address=advertised(server.address, settings.advertise)
        )
        withdraw = await stack.enter_async_context(announced(settings, record))
        await server.set_serving(True)
        await worker.wait_stop(stop)
        worker.draining = True
        await withdraw()
        await server.drain(worker.wait_idle)
