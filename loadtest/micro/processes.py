"""Baton's own processes as children of a benchmark, on loopback; they die with it. Knows nothing of what is measured."""

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.baton.v1 import status_pb2, status_pb2_grpc
from services.mesh.child_process import bound_to_parent
from services.mesh.client import open_channel

START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A running child."""

    address: str
    pid: int

    def processor_s(self) -> float:
        """Processor time it has used so far, in seconds; Linux only."""
        with open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def service(name: str, **settings: object) -> Iterator[Service]:
    """`python -m services.{name}` with these settings, on a free port. It may not serve yet when the block begins."""
    address = f"127.0.0.1:{free_port()}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
    environment |= {f"BATON_{key.upper()}": str(value) for key, value in settings.items()}
    environment |= {"BATON_LISTEN": address, "BATON_LOG_LEVEL": "WARNING"}
    if name == "router":
        environment.setdefault("BATON_HTTP_LISTEN", "off")  # its usual port is one, and may be taken
    command = bound_to_parent([sys.executable, "-m", f"services.{name}"])
    # In a group of its own: Ctrl-C is for the benchmark, which ends it.
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0) as process:
        try:
            yield Service(address=address, pid=process.pid)
        finally:
            process.kill()


async def wait_for_workers(router: str, count: int) -> None:
    """Returns when the router can use so many workers. Raises TimeoutError after START_TIMEOUT_S."""
    await wait_for_status(router, lambda status: sum(worker.state == "up" for worker in status.workers) >= count)


async def wait_for_status(router: str, condition: Callable[[status_pb2.WatchStatusResponse], bool]) -> None:
    """Returns when the router's status fulfils the condition. Raises TimeoutError after START_TIMEOUT_S."""
    async with open_channel(router) as channel, asyncio.timeout(START_TIMEOUT_S):
        stub = status_pb2_grpc.StatusServiceStub(channel)
        while True:
            call = stub.WatchStatus(status_pb2.WatchStatusRequest())
            with contextlib.suppress(grpc.aio.AioRpcError):
                if condition(await call.read()):
                    call.cancel()
                    return
            call.cancel()
            await asyncio.sleep(0.1)


async def health_check_ms(address: str, count: int, *, pause_s: float = 0.0) -> float:
    """What a call costs that does next to nothing: the median of so many round trips, in milliseconds."""
    times = []
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for _ in range(count + 1):  # the first one connects
            await asyncio.sleep(pause_s)
            started = time.perf_counter()
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=START_TIMEOUT_S)
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) * 1e3


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
