"""Watches a mesh from its router while a run goes on: each worker's state, queue and KV blocks, several times a second.

For what only a mesh can tell: how many workers served, when the router noticed that one was gone, whether anything is still held at the
end. A router that does not answer is asked again; what was seen stays.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from protos.baton.v1 import status_pb2, status_pb2_grpc
from services.mesh.client import open_channel

INTERVAL_S = 0.1
RETRY_S = 0.2
SETTLE_S = 15.0  # for what is held to be let go after the last answer: a fenced transfer waits for its sender's end


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A worker at one moment; `at_s` is time.monotonic()'s."""

    at_s: float
    state: str
    epoch: int


@dataclass(slots=True)
class Watch:
    """`async with watching(address) as watch`. Histories hold changes of state and epoch alone."""

    router: str
    latest: status_pb2.WatchStatusResponse | None = None
    histories: dict[str, list[Sighting]] = field(default_factory=dict)
    seen: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, status: status_pb2.WatchStatusResponse) -> None:
        self.latest = status
        for worker in status.workers:
            history = self.histories.setdefault(worker.worker.worker_id, [])
            if not history or (history[-1].state, history[-1].epoch) != (worker.state, worker.worker.epoch):
                history.append(Sighting(at_s=time.monotonic(), state=worker.state, epoch=worker.worker.epoch))
        # A worker that is not named any more has left.
        for worker_id in set(self.histories) - {worker.worker.worker_id for worker in status.workers}:
            history = self.histories[worker_id]
            if history[-1].state != "gone":
                history.append(Sighting(at_s=time.monotonic(), state="gone", epoch=history[-1].epoch))
        self.seen.set()

    def address_of(self, worker_id: str) -> str | None:
        """Where a worker was heard of last."""
        workers = () if self.latest is None else self.latest.workers
        return next((worker.address for worker in workers if worker.worker.worker_id == worker_id), None)

    def worker_ids(self, role: str) -> list[str]:
        """Of a role, or the one of that name; those that are up."""
        workers = () if self.latest is None else self.latest.workers
        return sorted(w.worker.worker_id for w in workers if role in (w.role, w.worker.worker_id) and w.state == "up")

    def names(self) -> set[str]:
        """Of all workers, and of their roles."""
        workers = () if self.latest is None else self.latest.workers
        return {name for worker in workers for name in (worker.role, worker.worker.worker_id)}

    def unnoticed_since(self, worker_id: str, at_s: float) -> float | None:
        """Seconds from `at_s` until the router saw that a worker was not what it had been; None: it has not."""
        for sighting in self.histories.get(worker_id, ()):
            if sighting.at_s >= at_s:
                return sighting.at_s - at_s
        return None

    def held(self) -> dict[str, int]:
        """Blocks that belong to somebody, by worker; only those that have any."""
        workers = () if self.latest is None else self.latest.workers
        counts = {w.worker.worker_id: w.load.blocks_owned + w.load.blocks_quarantined for w in workers if w.state == "up"}
        return {worker_id: count for worker_id, count in counts.items() if count}

    async def wait_settled(self) -> dict[str, int]:
        """What is still held when everything should have been let go; empty as soon as nothing is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                while True:
                    self.seen.clear()
                    await self.seen.wait()
                    if not self.held() and self.latest is not None and not self.latest.in_flight:
                        return {}
        return self.held()


@contextlib.asynccontextmanager
async def watching(router: str) -> AsyncIterator[Watch]:
    """Watches until the block is left."""
    watch = Watch(router)
    task = asyncio.ensure_future(_watch(watch))
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def _watch(watch: Watch) -> None:
    async with open_channel(watch.router) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        while True:
            call = stub.WatchStatus(status_pb2.WatchStatusRequest(interval_s=INTERVAL_S))
            try:
                async for status in call:
                    watch.take(status)
            except grpc.aio.AioRpcError:
                pass
            finally:
                call.cancel()
            await asyncio.sleep(RETRY_S)
