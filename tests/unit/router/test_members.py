"""Who the router talks to while workers come, drain and go."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from protos.baton.v1 import decode_pb2
from services.core.prefix_index import PrefixIndex
from services.mesh.discovery import WorkerRecord
from services.router.decode_session import RequestStream
from services.router.members import Members
from tests.unit.router.scripted_worker import Worker, tokens
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
