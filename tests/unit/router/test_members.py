"""Who the router talks to while workers come, drain and go."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from protos.baton.v1 import common_pb2, decode_pb2, prefill_pb2, prefill_pb2_grpc
from services.core.prefix_index import PrefixIndex
from services.mesh.discovery import WorkerRecord
from services.mesh.server import MeshServer
from services.router.decode_session import RequestStream
from services.router.members import Members
from tests.unit.router.scripted_worker import IDENTITY, LOAD, Worker, tokens
from tests.waiting import wait_until


class Announcements:
    """A discovery in which the test announces and withdraws."""

    def __init__(self) -> None:
        self._lists: asyncio.Queue[frozenset[WorkerRecord]] = asyncio.Queue()

    def announce(self, *records: WorkerRecord) -> None:
        self._lists.put_nowait(frozenset(records))

    async def watch(self) -> AsyncGenerator[frozenset[WorkerRecord], None]:
        while True:
            yield await self._lists.get()


def test_decode_worker_when_it_is_withdrawn_gets_nothing_new_and_its_requests_go_on() -> None:
    """A worker that drains withdraws its announcement first; what it has accepted is followed to the end."""

    async def main() -> None:
        worker, discovery = Worker(), Announcements()
        replica: Any = SimpleNamespace(index=PrefixIndex(), synchronized=True)
        members = Members(discovery, replica, router_id="r", served_model_name=None)
        async with asyncio.timeout(20), worker.serving() as address, asyncio.TaskGroup() as tasks:
            following = tasks.create_task(members.run())
            discovery.announce(WorkerRecord(worker_id="d0", epoch=1, role="decode", address=address))
            await wait_until(lambda: [known.state for known in members.status().workers] == ["up"])
            session, stream = members.session("d0"), RequestStream([1], on_slow_reader=lambda: None)
            start = decode_pb2.Start(request_id="a")
            session.start(start, stream, [0])
            discovery.announce()
            await wait_until(lambda: not members.status().workers)
            assert members.fleet is not None and not members.fleet.workers(0.0)
            worker.frames.put_nowait(tokens(start.handle, 1, 5))
            assert [arrival.token_ids for arrival in await stream.next_arrivals()] == [(5,)]
            session.cancel(stream)
            await wait_until(lambda: not session.is_up)
            following.cancel()

    asyncio.run(main())


def identity(**fields: Any) -> common_pb2.ModelIdentity:
    changed = common_pb2.ModelIdentity()
    changed.CopyFrom(IDENTITY)
    changed.MergeFrom(common_pb2.ModelIdentity(**{name: value for name, value in fields.items() if value}))
    for name in [name for name, value in fields.items() if not value]:
        changed.ClearField(name)
    return changed


IMPOSSIBLE = {
    "no name": decode_pb2.SessionWelcome(worker=common_pb2.WorkerId(worker_id=""), model=IDENTITY),
    "another worker's name": decode_pb2.SessionWelcome(worker=common_pb2.WorkerId(worker_id="d0", epoch=2**64 - 1), model=IDENTITY),
    "a name without end": decode_pb2.SessionWelcome(worker=common_pb2.WorkerId(worker_id="d" * 100_000), model=IDENTITY),
    "no model": decode_pb2.SessionWelcome(worker=common_pb2.WorkerId(worker_id="d1")),
    **{
        f"no {name}": decode_pb2.SessionWelcome(worker=common_pb2.WorkerId(worker_id="d1"), model=identity(**{name: 0}))
        for name in ("block_size", "block_bytes", "max_model_len", "vocab_size")
    },
    "defaults that nobody may ask for": decode_pb2.SessionWelcome(
        worker=common_pb2.WorkerId(worker_id="d1"), model=identity(defaults=common_pb2.SamplingParams(temperature=float("nan")))
    ),
}


class Prefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Says one thing about itself to whoever watches, then nothing; the calls it had are counted."""

    def __init__(self, *responses: prefill_pb2.WatchLoadResponse) -> None:
        self._responses = responses
        self.num_calls = 0

    async def WatchLoad(  # noqa: N802
        self, request: prefill_pb2.WatchLoadRequest, context: Any
    ) -> AsyncGenerator[prefill_pb2.WatchLoadResponse, None]:
        self.num_calls += 1
        for response in self._responses:
            yield response
        await asyncio.Event().wait()


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_worker_when_it_cannot_be_what_it_says_is_not_used_and_the_others_are(role: str, name: str) -> None:
    """Some of these made every request fail, and one took a good worker's place."""

    async def main() -> None:
        welcome, good, discovery = IMPOSSIBLE[name], Worker(), Announcements()
        bad = Worker()
        bad.welcome = welcome
        liar = Prefill(prefill_pb2.WatchLoadResponse(worker=welcome.worker, model=welcome.model, load=LOAD))

        def register(server: grpc.aio.Server) -> None:
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(liar, server)

        replica: Any = SimpleNamespace(index=PrefixIndex(), synchronized=True)
        members = Members(discovery, replica, router_id="r", served_model_name=None)
        async with (
            asyncio.timeout(20),
            good.serving() as address,
            bad.serving() as bad_address,
            MeshServer("127.0.0.1:0", register, services=[]) as server,
            asyncio.TaskGroup() as tasks,
        ):
            following = tasks.create_task(members.run())
            record = WorkerRecord(worker_id="d0", epoch=1, role="decode", address=address)
            other = WorkerRecord(worker_id="x", epoch=1, role=role, address=bad_address if role == "decode" else server.address)
            discovery.announce(record)
            await wait_until(lambda: members.fleet is not None)
            discovery.announce(record, other)
            await wait_until(lambda: (len(bad.commands) if role == "decode" else liar.num_calls) >= 3)
            assert {worker.address: worker.state for worker in members.status().workers} == {address: "up", other.address: "connecting"}
            assert members.fleet is not None
            assert [worker.worker_id for worker in members.fleet.workers(0.0)] == ["d0"]
            assert members.session("d0").is_up
            following.cancel()

    asyncio.run(main())


def test_prefill_worker_when_it_says_twice_who_it_is_is_met_anew() -> None:
    async def main() -> None:
        names = [common_pb2.WorkerId(worker_id=name, epoch=1) for name in ("p0", "p1")]
        liar = Prefill(*(prefill_pb2.WatchLoadResponse(worker=name, model=IDENTITY, load=LOAD) for name in names))

        def register(server: grpc.aio.Server) -> None:
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(liar, server)

        good, discovery = Worker(), Announcements()
        replica: Any = SimpleNamespace(index=PrefixIndex(), synchronized=True)
        members = Members(discovery, replica, router_id="r", served_model_name=None)
        async with (
            asyncio.timeout(20),
            good.serving() as address,
            MeshServer("127.0.0.1:0", register, services=[]) as server,
            asyncio.TaskGroup() as tasks,
        ):
            following = tasks.create_task(members.run())
            decode = WorkerRecord(worker_id="d0", epoch=1, role="decode", address=address)
            discovery.announce(decode, WorkerRecord(worker_id="p0", epoch=1, role="prefill", address=server.address))
            await wait_until(lambda: liar.num_calls >= 3)
            assert members.fleet is not None
            assert "p1" not in {worker.worker_id for worker in members.fleet.workers(0.0)}
            following.cancel()

    asyncio.run(main())
