"""Puts a router together and runs it until it is told to stop."""

import asyncio
import contextlib
import gc

import grpc

from protos.baton.v1 import inference_pb2_grpc, status_pb2_grpc
from services.engine.demo import TARGET_DIR
from services.mesh.discovery import Discovery, RedisDiscovery, StaticDiscovery
from services.mesh.index_client import IndexReplica
from services.mesh.redis_store import RedisStore
from services.mesh.server import MeshServer
from services.router.admission import Admission
from services.router.generation import Generator
from services.router.members import Members
from services.router.openai.app import OpenAIApp
from services.router.openai.server import HttpServer
from services.router.policy import warm_up
from services.router.prompts import Prompts
from services.router.service import InferenceServicer, StatusServicer
from services.router.settings import NO_HTTP, RouterSettings
from services.tokenizer.checkpoint_dir import resolve_checkpoint
from services.tokenizer.tokenizer import Tokenizer

# Requests are small; what is larger than this was not meant for us.
MAX_REQUEST_BYTES = 16 << 20


async def serve(settings: RouterSettings, stop: asyncio.Event) -> None:
    """Serves until `stop` is set and what was accepted has ended."""
    directory = await asyncio.to_thread(resolve_checkpoint, settings.model, demo=TARGET_DIR)
    tokenizer = await asyncio.to_thread(Tokenizer.from_checkpoint, directory)
    await asyncio.to_thread(warm_up)
    # What lives as long as the process need not be looked at again by each full collection. Before the first call to anybody: what is
    # frozen is never collected, and a call that ends may need it.
    gc.freeze()
    async with contextlib.AsyncExitStack() as stack:
        discovery: Discovery = StaticDiscovery.parse(settings.workers)
        if settings.redis_url is not None:
            discovery = RedisDiscovery(await stack.enter_async_context(RedisStore(settings.redis_url)), namespace=settings.namespace)
        replica = await stack.enter_async_context(IndexReplica(settings.kv_index))
        router_id = settings.resolved_router_id()
        members = Members(discovery, replica, router_id=router_id, served_model_name=settings.served_model_name)
        admission = Admission(max_in_flight=settings.max_in_flight, ttft_slo_s=settings.ttft_slo_s or None)
        generator = Generator(
            members,
            replica,
            tokenizer,
            admission,
            router_id=router_id,
            max_local_tokens=settings.max_local_tokens,
            recovery_s=settings.recovery_s,
        )

        prompts = Prompts(members, tokenizer)

        def register(server: grpc.aio.Server) -> None:
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(generator, members, prompts), server)
            status_pb2_grpc.add_StatusServiceServicer_to_server(StatusServicer(generator, members), server)

        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(members.run())
            server = MeshServer(
                settings.listen,
                register,
                services=["baton.v1.InferenceService", "baton.v1.StatusService"],
                drain_timeout_s=settings.drain_timeout_s,
                max_message_bytes=MAX_REQUEST_BYTES,
            )
            http = _http_server(settings, generator, prompts, members)
            async with server, http or contextlib.nullcontext():
                await server.set_serving(True)
                await stop.wait()
                generator.draining = True
                await server.drain(generator.wait_idle)
            following.cancel()


def _http_server(settings: RouterSettings, generator: Generator, prompts: Prompts, members: Members) -> HttpServer | None:
    if settings.http_listen == NO_HTTP:
        return None
    app = OpenAIApp(generator.generate, prompts, can_serve=lambda: members.can_serve() and not generator.draining)
    return HttpServer(app, settings.http_listen)
