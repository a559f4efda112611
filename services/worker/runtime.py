"""Puts a worker together: a checkpoint's engine over memory that the KV data plane can reach, and the books about both.

The engine knows no network and the mesh no torch; here, and only here, they are introduced to each other.
"""

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from protos.baton.v1 import common_pb2
from services.core.errors import EngineStopped, InvalidRequest
from services.engine.demo import TARGET_DIR
from services.engine.engine import Engine
from services.engine.loader import LoadedModel, load_model
from services.engine.model_config import GenerationDefaults
from services.mesh.discovery import Announcement, WorkerRecord
from services.mesh.index_client import IndexPublisher
from services.mesh.kv_transport import KVMemory
from services.mesh.redis_store import RedisStore
from services.tokenizer.checkpoint_dir import resolve_checkpoint
from services.worker.settings import WorkerSettings

_log = logging.getLogger(__name__)


class Worker:
    """An engine that runs, its KV memory, and what others are told about it."""

    def __init__(self, *, worker_id: str, epoch: int, loaded: LoadedModel, memory: KVMemory, engine: Engine, model_name: str) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.engine = engine
        self.memory = memory
        self.draining = False
        self.kv_bytes_received = 0
        self.kv_bytes_sent = 0
        self._lifting: set[asyncio.Task[None]] = set()
        core = loaded.core
        self.block_size = core.block_size
        self.groups = core.groups
        self._max_num_seqs = core.scheduler.max_num_seqs
        self.identity = common_pb2.ModelIdentity(
            model_name=model_name,
            model_fingerprint=core.model_fingerprint,
            layout_fingerprint=core.layout_fingerprint,
            block_size=core.block_size,
            block_bytes=core.block_bytes,
            max_model_len=core.max_model_len,
            vocab_size=core.vocab_size,
            defaults=_sampling_defaults(loaded.generation),
        )

    @property
    def id_message(self) -> common_pb2.WorkerId:
        return common_pb2.WorkerId(worker_id=self.worker_id, epoch=self.epoch)

    def load(self) -> common_pb2.WorkerLoad:
        """How busy the worker is now."""
        stats = self.engine.stats()
        return common_pb2.WorkerLoad(
            num_running=stats.num_running + stats.num_reserved,
            num_waiting=stats.num_waiting,
            uncomputed_prompt_tokens=stats.uncomputed_prompt_tokens,
            blocks_total=stats.room.total,
            blocks_free=stats.room.free,
            blocks_cached=stats.room.cached,
            blocks_owned=stats.room.owned,
            blocks_quarantined=stats.room.quarantined,
            engine_steps=stats.steps,
            prefill_tokens=stats.prefill_tokens,
            decode_tokens=stats.decode_tokens,
            cached_tokens=stats.cached_tokens,
            kv_bytes_received=self.kv_bytes_received,
            kv_bytes_sent=self.kv_bytes_sent,
            step_s=stats.step_s,
            draining=self.draining,
            max_num_seqs=self._max_num_seqs,
        )

    def lift_quarantine_later(self, block_ids: Sequence[int], wait_fenced: Callable[[], Awaitable[None]]) -> None:
        """Frees quarantined blocks once nobody can write into them any more."""

        async def lift() -> None:
            await wait_fenced()
            self.engine.lift_quarantine(block_ids)

        task = asyncio.ensure_future(lift())
        self._lifting.add(task)
        task.add_done_callback(self._lifting.discard)

    async def close(self) -> None:
        """Stops waiting for fences: the memory they protect is about to go."""
        for task in self._lifting:
            task.cancel()
        await asyncio.gather(*self._lifting, return_exceptions=True)

    async def wait_stop(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set. Raises EngineStopped when the engine has failed: the next start of this process has another one."""
        waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(self.engine.wait_failed())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not stop.is_set():
            raise EngineStopped("the engine failed")

    async def wait_idle(self) -> None:
        """Until the engine has nothing to do for anybody."""
        while True:
            stats = self.engine.stats()
            if stats.num_running + stats.num_waiting + stats.num_reserved + stats.num_held == 0:
                return
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def start_worker(settings: WorkerSettings, role: str) -> AsyncIterator[Worker]:
    """Loads the model on a thread, so that the process answers meanwhile, and runs the engine until the block ends.

    Raises CheckpointError and InvalidRequest as the loader does.
    """
    directory = await asyncio.to_thread(resolve_checkpoint, settings.model, demo=TARGET_DIR)
    engine_settings = settings.engine_settings()
    memories: list[KVMemory] = []

    def allocate_kv(regions: Sequence[tuple[int, int]]) -> memoryview:
        memories.append(KVMemory(regions))
        return memories[0].buffer

    started = time.monotonic()
    loaded = await asyncio.to_thread(load_model, directory, engine_settings, allocate_kv=allocate_kv)
    _log.info("model loaded", extra={"seconds": round(time.monotonic() - started, 2), "num_blocks": loaded.core.stats().blocks_total})
    # The model and all that was imported need not be looked at by each full collection. Before the first call: see the router's.
    gc.freeze()
    worker_id = settings.worker_id or f"{role}-{settings.listen}"
    epoch = time.time_ns()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(memories[0])
        publisher = await stack.enter_async_context(IndexPublisher(settings.kv_index, worker_id=worker_id, epoch=epoch))

        def on_blocks(stored: list[bytes], removed: list[bytes]) -> None:
            publisher.publish_nowait(stored=stored, removed=removed)

        engine = await stack.enter_async_context(Engine(loaded.core, max_num_requests=settings.max_num_requests, on_blocks=on_blocks))
        worker = Worker(
            worker_id=worker_id,
            epoch=epoch,
            loaded=loaded,
            memory=memories[0],
            engine=engine,
            model_name=settings.served_model_name or _model_name(settings.model, directory),
        )
        stack.push_async_callback(worker.close)
        yield worker


@contextlib.asynccontextmanager
async def announced(settings: WorkerSettings, record: WorkerRecord) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Announces the worker for as long as the block lasts, or until the function that it gets is called: a drain does so first of all."""
    async with contextlib.AsyncExitStack() as stack:
        if settings.redis_url is None:
            yield _nothing
            return
        store = await stack.enter_async_context(RedisStore(settings.redis_url))
        announcement = await stack.enter_async_context(Announcement(store, record, namespace=settings.namespace))
        yield announcement.withdraw


async def _nothing() -> None:
    """Routers that list their workers in a setting see a drain in the worker's load."""


def advertised(address: str, host: str | None) -> str:
    """The address under which others reach a server that listens on `address`. Raises InvalidRequest for one that nobody could call."""
    listened, _, port = address.rpartition(":")
    if host is None and listened in ("0.0.0.0", "[::]"):
        raise InvalidRequest("advertise", f"is needed: others cannot call {address}")
    return f"{host or listened}:{port}"


def _model_name(model: str, directory: Path) -> str:
    return model if not Path(model).expanduser().is_dir() else directory.resolve().name


def _sampling_defaults(generation: GenerationDefaults) -> common_pb2.SamplingParams:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return common_pb2.SamplingParams(**{name: value for name in names if (value := getattr(generation, name)) is not None})
