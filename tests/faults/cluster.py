"""A whole mesh of real processes that tests hurt and mend: two routers, two prefill and three decode workers, the index, a Redis.

Each decode worker takes KV blocks by another transport. Everybody calls everybody through a proxy, and every process of ours has
failpoints. Who has been killed stays dead until it is started again here. Knows nothing of requests or of what a test expects.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import redis.asyncio

from protos.baton.v1 import common_pb2, inference_pb2_grpc, status_pb2, status_pb2_grpc
from services.cli.ports import HOST, ReservedPorts
from services.cli.readiness import grpc_probe, redis_probe
from services.mesh.child_process import bound_to_parent
from services.mesh.client import open_channel
from services.mesh.failpoints import Arming
from services.mesh.redis_server import server_command
from tests.faults.proxy import PROXY_HOST, Proxy
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
ROUTERS, PREFILLS, DECODES = ("router-0", "router-1"), ("prefill-0", "prefill-1"), ("decode-0", "decode-1", "decode-2")
WORKERS = PREFILLS + DECODES
TRANSPORTS = {"decode-0": "shm", "decode-1": "tcp", "decode-2": "grpc"}
START_TIMEOUT_S = 60.0
# Small blocks, small chunks: a prompt of a few hundred tokens has many of both.
_WORKER = {"model": "demo", "block_size": "16", "kv_memory_bytes": str(1 << 25), "prefill_chunk_tokens": "64", "drain_timeout_s": "10"}


@dataclass(slots=True, kw_only=True, eq=False)
class Service:
    """One process and its successors."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    is_serving: Callable[[], Awaitable[bool]]
    proxies: Sequence[Proxy]
    failpoints: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def role(self) -> str:
        return self.name.partition("-")[0]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process holds of its machine."""

    pid: int
    descriptors: int
    threads: int
    rss_bytes: int


@dataclass(slots=True)
class Cluster:
    """`async with Cluster(folder)`: all serve when it is entered; all are gone when it is left. For the main thread."""

    folder: Path
    services: dict[str, Service] = field(default_factory=dict)
    _ports: ReservedPorts = field(default_factory=ReservedPorts)
    _channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    _addresses: dict[str, str] = field(default_factory=dict)
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def __aenter__(self) -> Self:
        self._stack.enter_context(self._ports)
        self._stack.callback(self._kill_all)
        redis_port, index_port = self._ports.take(), self._ports.take()
        shared = {"redis_url": f"redis://{PROXY_HOST}:{redis_port}/0"}
        mesh = {**shared, "kv_index": f"{PROXY_HOST}:{index_port}"}
        await self._add("redis", redis_port, {}, command=server_command(redis_port))
        await self._add("kv_index", index_port, shared)
        for name in WORKERS:
            own = {**mesh, **_WORKER, "worker_id": name, "advertise": PROXY_HOST}
            if name in DECODES:
                own |= {"kv_port": str(self._ports.take()), "kv_transports": TRANSPORTS[name]}
            await self._add(name, self._ports.take(), own)
        for name in ROUTERS:
            await self._add(
                name, self._ports.take(), {**mesh, "model": "demo", "router_id": name, "max_local_tokens": "0", "http_listen": "off"}
            )
        for name in self.services:
            self.launch(name)
        for name in self.services:
            await self.wait_serving(name)
        await self.wait_whole()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self._stack.__aexit__(kind, error, traceback)

    def launch(self, name: str) -> None:
        """Starts a process that does not run; wait_serving() waits until it is of use."""
        service = self.services[name]
        assert not service.is_running
        with service.log.open("ab") as log:
            service.process = subprocess.Popen(
                bound_to_parent(service.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(service.environment),
                cwd=self.folder,
                start_new_session=True,
            )

    async def wait_serving(self, name: str) -> None:
        service = self.services[name]
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while not await service.is_serving():
            assert service.is_running, f"{name} ended: {service.log.read_text()[-2000:]}"
            assert asyncio.get_running_loop().time() < deadline, f"{name} does not serve"
            await asyncio.sleep(0.02)

    def send(self, name: str, number: signal.Signals) -> None:
        os.kill(self.services[name].pid, number)

    async def wait_ended(self, name: str, timeout_s: float) -> int:
        """Its exit status."""
        process = self.services[name].process
        assert process is not None
        await wait_until(lambda: process.poll() is not None, timeout_s)
        return process.returncode

    async def mend(self) -> None:
        """Lets everybody go on, starts those who are dead, takes all failpoints and slow links away; waits until the mesh is whole."""
        for service in self.services.values():
            for file in service.failpoints.iterdir():
                file.unlink()
            for proxy in service.proxies:
                proxy.is_slow = False
            if service.is_running:
                os.kill(service.pid, signal.SIGCONT)
        dead = [name for name, service in self.services.items() if not service.is_running]
        for name in dead:
            self.launch(name)
        for name in dead:
            await self.wait_serving(name)
        await self.wait_whole()

    async def wait_whole(self) -> None:
        """Until every router can use every worker and has the index, and Redis knows all of them."""
        await wait_until(self._is_whole, START_TIMEOUT_S)

    async def status(self, router: str) -> status_pb2.WatchStatusResponse:
        """What a router sees now. Raises AioRpcError when it does not answer."""
        call = status_pb2_grpc.StatusServiceStub(self.channel(router)).WatchStatus(status_pb2.WatchStatusRequest(), timeout=2.0)
        try:
            response: status_pb2.WatchStatusResponse = await call.read()
            if not isinstance(response, status_pb2.WatchStatusResponse):  # the end of the stream
                raise AssertionError(f"{router} gave no status")
            return response
        finally:
            call.cancel()

    async def loads(self, router: str) -> dict[str, common_pb2.WorkerLoad]:
        """Each worker's books, as that router heard last."""
        return {worker.worker.worker_id: worker.load for worker in (await self.status(router)).workers}

    def stub(self, router: str) -> inference_pb2_grpc.InferenceServiceStub:
        return inference_pb2_grpc.InferenceServiceStub(self.channel(router))

    def channel(self, name: str) -> grpc.aio.Channel:
        if name not in self._channels:
            self._channels[name] = open_channel(self._addresses[name])
            self._stack.push_async_callback(self._channels[name].close)
        return self._channels[name]

    def arm(self, role: str, point: str, arming: Arming) -> None:
        """In all processes of a role, until one of them strikes."""
        for service in self._of_role(role):
            draft = service.failpoints.with_name(f"{service.name}.draft")
            draft.write_text(str(arming))
            draft.rename(service.failpoints / point)

    def disarm(self, role: str, point: str) -> None:
        """Also lets go whoever stands at the point."""
        for service in self._of_role(role):
            (service.failpoints / point).unlink(missing_ok=True)
            (service.failpoints / f"{point}.paused").unlink(missing_ok=True)

    def paused_at(self, role: str, point: str) -> str | None:
        """Who stands there."""
        return next((service.name for service in self._of_role(role) if (service.failpoints / f"{point}.paused").exists()), None)

    def struck_at(self, role: str, point: str) -> bool:
        """Whether one of those that were armed has struck."""
        return not all((service.failpoints / point).exists() for service in self._of_role(role))

    def usage(self, name: str) -> Usage:
        pid = self.services[name].pid
        process = Path(f"/proc/{pid}")
        pages = int((process / "statm").read_text().split()[1])
        return Usage(
            pid=pid,
            descriptors=len(list((process / "fd").iterdir())),
            # Python's own: the pools of gRPC and libuv grow to their bounds when it pleases them.
            threads=[(task / "comm").read_text().strip() for task in (process / "task").iterdir()].count("python"),
            rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        )

    def connections(self, name: str) -> dict[str, int]:
        """How many TCP connections a process has with whom, for people who look for one too many."""
        links = [link for link in Path(f"/proc/{self.services[name].pid}/fd").iterdir() if link.is_symlink()]
        own = set()
        for link in links:
            with contextlib.suppress(OSError):  # closed meanwhile
                own.add(str(link.readlink())[len("socket:[") : -1])
        ports = {int(address.rpartition(":")[2]): other for other, address in self._addresses.items()}
        found: Counter[str] = Counter()
        lines = [line for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        for line in lines:
            _, local, remote, _, _, _, _, _, _, inode, *_ = line.split()
            if inode in own:
                here, there = (int(address.partition(":")[2], 16) for address in (local, remote))
                found["to " + ports[there] if there in ports else "from others" if ports.get(here) == name else "KV"] += 1
        return dict(found)

    async def _is_whole(self) -> bool:
        try:
            for router in ROUTERS:
                status = await self.status(router)
                states = {worker.worker.worker_id: worker.state for worker in status.workers}
                if states != dict.fromkeys(WORKERS, "up") or not status.index_synchronized:
                    return False
            store = redis.asyncio.Redis.from_url(self.services["kv_index"].environment["BATON_REDIS_URL"])
            try:
                members, indexed = await store.hlen("baton:{default}:members"), await store.hlen("baton:{default}:index:workers")
            finally:
                await store.aclose()
            return (members, indexed) == (len(WORKERS), len(WORKERS))
        except (grpc.aio.AioRpcError, redis.RedisError, OSError):
            return False

    def _of_role(self, role: str) -> list[Service]:
        return [service for service in self.services.values() if service.role == role]

    async def _add(self, name: str, port: int, settings: Mapping[str, str], *, command: Sequence[str] | None = None) -> None:
        failpoints = self.folder / "failpoints" / name
        failpoints.mkdir(parents=True)
        settings = {"listen": f"{HOST}:{port}", "failpoints": str(failpoints), **settings}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
        ports = [port, *([int(settings["kv_port"])] if "kv_port" in settings else [])]
        self._addresses[name] = f"{PROXY_HOST}:{port}"
        self.services[name] = Service(
            name=name,
            command=command or (sys.executable, "-m", f"services.{name.partition('-')[0]}"),
            environment={
                **inherited,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                **{f"BATON_{key.upper()}": value for key, value in settings.items()},
            },
            is_serving=redis_probe(HOST, port) if name == "redis" else grpc_probe(f"{HOST}:{port}"),
            proxies=[await self._stack.enter_async_context(Proxy(each)) for each in ports],
            failpoints=failpoints,
            log=self.folder / f"{name}.log",
        )

    def _kill_all(self) -> None:
        for service in self.services.values():
            if service.is_running:
                service.process.kill()  # type: ignore[union-attr]
        for service in self.services.values():
            if service.process is not None:
                service.process.wait()
