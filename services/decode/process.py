"""Puts a decode worker together and runs it until it is told to stop."""

import asyncio
import contextlib

import grpc

from protos.baton.v1 import decode_pb2_grpc
from services.decode.remote_prefill import PrefillClient
from services.decode.service import DecodeServicer
from services.mesh.discovery import WorkerRecord
from services.mesh.kv_transport import KVReceiver
from services.mesh.server import MeshServer
from services.worker.runtime import advertised, announced, start_worker
from services.worker.settings import WorkerSettings


async def serve(settings: WorkerSettings, stop: asyncio.Event) -> None:
    """Serves until `stop` is set and what was accepted has ended."""
    async with contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(start_worker(settings, "decode"))
        fingerprint = worker.identity.layout_fingerprint
        receiver = await stack.enter_async_context(
            KVReceiver(
                worker.memory,
                layout_fingerprint=fingerprint,
                transports=settings.kv_transports,
                host=settings.listen.rpartition(":")[0],
                advertised_host=settings.advertise,
                tcp_port=settings.kv_port,
            )
        )
        prefill = await stack.enter_async_context(PrefillClient(receiver, layout_fingerprint=fingerprint))
        servicer = DecodeServicer(worker, prefill, transports=settings.kv_transports)

        def register(server: grpc.aio.Server) -> None:
            decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server)

        server = await stack.enter_async_context(
            MeshServer(settings.listen, register, services=["baton.v1.DecodeService"], drain_timeout_s=settings.drain_timeout_s)
        )
        record = WorkerRecord(
            worker_id=worker.worker_id, epoch=worker.epoch, role="decode", address=advertised(server.address, settings.advertise)
        )
        withdraw = await stack.enter_async_context(announced(settings, record))
        await server.set_serving(True)
        await worker.wait_stop(stop)
        worker.draining = True
        await withdraw()

        async def wait_idle() -> None:
            await worker.wait_idle()
            await servicer.wait_idle()

        await server.drain(wait_idle)
