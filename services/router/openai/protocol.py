"""One connection of the HTTP server: uvicorn's, with the bounds that it lacks, and a request's task that ends when its client leaves.

no whole request within request_timeout_s   408, closed (slow loris; a client that connects and says nothing)
a head of more than MAX_HEAD_BYTES          431, closed
more connections than max_connections       503, closed
a client that does not read                 closed after write_timeout_s without the transport getting emptier
"""

import asyncio
import http
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from services.router.openai.errors import http_reply

MAX_HEAD_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """
    max_connections     at once
    request_timeout_s   from a request's first byte, or the connection's start, to the last byte of its body
    keep_alive_s        a connection may do nothing between two requests
    write_timeout_s     a client may leave a full transport unread
    """

    max_connections: int = 4096
    request_timeout_s: float = 30.0
    keep_alive_s: int = 75
    write_timeout_s: float = 30.0


class BoundedProtocol(HttpToolsProtocol):
    """`app` of the config runs in a task that is cancelled when the connection is lost."""

    def __init__(self, config: Config, server_state: ServerState, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(config, server_state, {}, loop)
        self._limits = limits
        self._whole_app = self.app
        self.app = self._run_app
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_lost = False
        self._head_bytes: int | None = 0  # None: the head is whole
        self._request_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self.app = _refuse
        if len(self.connections) > 2 * self._limits.max_connections:
            transport.abort()  # not even words for so many
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._forget_request_timer()
        self._forget_write_timer()
        super().connection_lost(exc)
        for task in self._tasks:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._request_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_request()
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._close_with(431, f"the head of the request has more than {MAX_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head_bytes = 0
        self._forget_request_timer()
        if self.cycle.response_complete:
            # It was answered before it was whole. What came since has stopped the clock that then began.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        elif not self.pipeline:
            # A long body has paused reading. Without it nobody would notice that the client leaves.
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_write_timer()

    def send_400_response(self, msg: str) -> None:
        self._close_with(400, "the request is not HTTP")

    async def _run_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_lost:
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._whole_app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._is_lost:
                raise
        finally:
            self._tasks.discard(task)

    def _await_request(self) -> None:
        self._request_timer = self.loop.call_later(self._limits.request_timeout_s, self._request_is_late)

    def _request_is_late(self) -> None:
        self._request_timer = None
        if self.cycle is not None and self.cycle.response_started:
            self.transport.close()
        else:
            self._close_with(408, f"no whole request came within {self._limits.request_timeout_s} s")

    def _close_with(self, status: int, message: str) -> None:
        if not self.transport.is_closing():
            body = http_reply(status, message).body
            head = (
                f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

    def _forget_request_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _forget_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    reply = http_reply(503, "too many connections", retry_after_s=1)
    headers = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
    headers += [(b"content-length", str(len(reply.body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})
