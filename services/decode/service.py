"""DecodeService: one Session for each router. Its end, from whichever side and however, aborts what it had started."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from protos.baton.v1 import decode_pb2, decode_pb2_grpc
from services.core.errors import Incompatible, InvalidRequest
from services.decode.remote_prefill import PrefillClient
from services.decode.session import RouterSession
from services.worker.runtime import Worker

MAX_ROUTER_ID_CHARACTERS = 256  # it is part of every request's name here


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Serves one Worker; `prefill` reaches those who compute prompts for it."""

    def __init__(self, worker: Worker, prefill: PrefillClient, *, transports: Sequence[str]) -> None:
        self._worker = worker
        self._prefill = prefill
        self._transports = transports
        self._num_sessions = 0
        self._sessions: set[RouterSession] = set()

    async def wait_idle(self) -> None:
        """Until every router has been sent all that was made for it."""
        for session in list(self._sessions):
            await session.wait_idle()

    async def Session(self, commands: AsyncIterator[decode_pb2.SessionCommand], context: Any) -> AsyncGenerator[decode_pb2.StepFrame, None]:
        first = await anext(aiter(commands), None)
        if first is None or first.WhichOneof("kind") != "hello":
            raise Incompatible("a session begins with hello")
        if len(first.hello.router_id) > MAX_ROUTER_ID_CHARACTERS:
            raise InvalidRequest("hello.router_id", f"has more than {MAX_ROUTER_ID_CHARACTERS} characters", limit=MAX_ROUTER_ID_CHARACTERS)
        worker = self._worker
        # Numbered: a router that comes again while its old session ends must not meet its own handles.
        self._num_sessions += 1
        name = f"{first.hello.router_id}#{self._num_sessions}"
        welcome = decode_pb2.SessionWelcome(worker=worker.id_message, model=worker.identity, kv_transports=self._transports)
        yield decode_pb2.StepFrame(hello=welcome, load=worker.load())
        async with asyncio.TaskGroup() as tasks:
            session = RouterSession(worker, self._prefill, tasks, name=name)
            readers = (tasks.create_task(session.obey(commands)), tasks.create_task(session.watch_silence()))
            self._sessions.add(session)
            try:
                async for frame in session.frames():
                    yield frame
            finally:
                self._sessions.discard(session)
                for reader in readers:
                    reader.cancel()
                session.close()
