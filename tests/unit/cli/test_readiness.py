"""Probes against real servers: what serves, what does not yet, what is not there; and whom a router can use."""

import asyncio

import pytest

from protos.baton.v1 import common_pb2, status_pb2
from services.cli.ports import ReservedPorts
from services.cli.readiness import grpc_probe, redis_probe, wait_workers_up
from services.core.errors import Incompatible
from services.mesh.redis_server import RedisServer
from tests.unit.cli.scripted_router import ScriptedRouter, serving
from tests.waiting import wait_until


def status(**states: str) -> status_pb2.WatchStatusResponse:
    workers = [
        status_pb2.WorkerStatus(worker=common_pb2.WorkerId(worker_id=name.replace("_", "-")), state=state) for name, state in states.items()
    ]
    return status_pb2.WatchStatusResponse(router_id="router-0", workers=workers)


def test_grpc_probe_when_a_server_comes_serves_drains_and_goes_tells_each() -> None:
    async def run() -> list[bool]:
        with ReservedPorts() as ports:
            address = f"127.0.0.1:{ports.take()}"
            probe = grpc_probe(address)
            answers = [await probe()]
            async with serving(ScriptedRouter(), address) as server:
                answers.append(await probe())
                await server.set_serving(False)
                answers.append(await probe())
            return [*answers, await probe()]

    assert asyncio.run(run()) == [False, True, False, False]


def test_redis_probe_when_a_server_runs_is_true_and_else_false() -> None:
    with ReservedPorts() as ports:
        port = ports.take()
        probe = redis_probe("127.0.0.1", port)
        assert not asyncio.run(probe())
        with RedisServer(port=port):
            assert asyncio.run(probe())
        assert not asyncio.run(probe())


def test_wait_workers_up_when_they_come_one_after_another_reports_each_change_once() -> None:
    reports: list[tuple[str, str]] = []
    router = ScriptedRouter(
        statuses=(
            status(),
            status(decode_0="connecting"),
            status(decode_0="connecting"),
            status(decode_0="up", stranger="up"),
            status(decode_0="up", decode_1="up", stranger="silent"),
        )
    )

    async def run() -> None:
        async with asyncio.timeout(20), serving(router) as server:
            await wait_workers_up(server.address, ["decode-0", "decode-1"], lambda name, words: reports.append((name, words)))

    asyncio.run(run())
    assert reports == [("decode-0", "connecting at router-0"), ("decode-0", "up at router-0"), ("decode-1", "up at router-0")]


def test_wait_workers_up_when_one_is_missing_goes_on_waiting() -> None:
    async def run() -> None:
        async with serving(ScriptedRouter(statuses=(status(decode_0="up"), status(decode_0="up", decode_1="silent")))) as server:
            async with asyncio.timeout(0.5):
                await wait_workers_up(server.address, ["decode-0", "decode-1"], lambda name, words: None)

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_wait_workers_up_when_the_stream_breaks_or_ends_asks_again() -> None:
    router = ScriptedRouter(statuses=(status(decode_0="connecting"),), status_ends=True)

    async def run() -> None:
        with ReservedPorts() as ports:
            address = f"127.0.0.1:{ports.take()}"
            async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
                waiting = tasks.create_task(wait_workers_up(address, ["decode-0"], lambda name, words: None))
                async with serving(router, address):
                    await wait_until(lambda: len(router.requests) >= 3)
                assert not waiting.done()
                async with serving(ScriptedRouter(statuses=(status(decode_0="up"),)), address):
                    await waiting

    asyncio.run(run())


def test_wait_workers_up_when_a_worker_never_will_be_gives_up() -> None:
    async def run() -> None:
        async with serving(ScriptedRouter(statuses=(status(decode_0="up", decode_1="incompatible"),))) as server:
            await wait_workers_up(server.address, ["decode-0", "decode-1"], lambda name, words: None)

    with pytest.raises(Incompatible, match="decode-1 serves another model than the other workers of router-0"):
        asyncio.run(run())
