"""OpenAI's HTTP, streamed: /v1/completions or /v1/chat/completions of any server. httptools parses HTTP, this file server-sent events.

Connections are kept and used again, as clients that people use do; a new one is opened when all are busy, so no request waits for another.
A server may close a kept connection just as a request is sent on it: without a single byte of an answer that request is sent once more, on
a new connection, and its time goes on.
"""

import asyncio
import json
import ssl
import time
from typing import Any, cast
from urllib.parse import SplitResult

import httptools

from loadtest.clients.answer import Answer

TOO_MANY_REQUESTS, SERVICE_UNAVAILABLE = 429, 503


class HttpClient:
    """`base` is the URL up to and with /v1; `headers` go with every request."""

    def __init__(self, base: SplitResult, path: str, headers: dict[str, str]) -> None:
        self._host, self._port = base.hostname or "", base.port or (443 if base.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if base.scheme == "https" else None
        fields = {"host": base.netloc, "content-type": "application/json", "accept": "text/event-stream", **headers}
        self._head = f"POST {base.path.rstrip('/')}{path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: list[_Connection] = []

    async def connect(self, num_connections: int = 8) -> None:
        """So that few requests pay for a connection. Raises OSError."""
        for connection in [await self._open() for _ in range(num_connections)]:
            self._idle.append(connection)

    async def send(self, payload: bytes, answer: Answer, timeout_s: float) -> None:
        answer.sent_s = time.monotonic()
        request = f"{self._head}content-length: {len(payload)}\r\n\r\n".encode() + payload
        connection = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = self._take_idle()
                if connection is not None:
                    await connection.exchange(request, answer)
                    if not connection.was_closed_unheard:
                        return
                    answer.error = ""
                connection = await self._open()
                await connection.exchange(request, answer)
        except TimeoutError:
            answer.error = f"DeadlineExceeded: no end within {timeout_s:g} s"
        except OSError as error:
            answer.error = f"PeerUnavailable: {error.strerror or error}"
        finally:
            answer.finished_s = time.monotonic()
            if connection is not None:
                if connection.is_reusable:
                    self._idle.append(connection)
                else:
                    connection.close()

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()
        await asyncio.sleep(0)  # asyncio closes sockets in its next round

    def _take_idle(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
            connection.close()
        return None

    async def _open(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        return connection


class _Connection(asyncio.Protocol):
    """One connection: one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer = Answer()
        self._ended: asyncio.Future[None] | None = None
        self._buffer = b""
        self._status = 0
        self._is_open = False
        self._keeps_alive = True
        self._body: list[bytes] = []  # of an answer that is no stream
        self._is_done = False
        self._has_heard = False

    @property
    def was_closed_unheard(self) -> bool:
        """Whether the last exchange ended with the connection, before anything came."""
        return not self._is_open and not self._has_heard

    @property
    def is_reusable(self) -> bool:
        return self._is_open and self._keeps_alive and self._ended is None

    async def exchange(self, request: bytes, answer: Answer) -> None:
        """Sends a request and notes the answer until its end."""
        assert self._transport is not None
        self._answer, self._parser = answer, httptools.HttpResponseParser(self)
        self._buffer, self._body, self._status, self._is_done, self._has_heard = b"", [], 0, False, False
        self._ended = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(request)
            await self._ended
            self._ended = None  # stays set when this is cancelled: the connection has an answer coming that nobody wants
        finally:
            if self._ended is not None:
                self._keeps_alive = False

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._is_open = cast(asyncio.Transport, transport), True  # uvloop's own classes are not asyncio's

    def data_received(self, data: bytes) -> None:
        self._has_heard = True
        if self._parser is None:
            self.close()  # nobody has asked for anything
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"InvalidAnswer: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_open = False
        self._end("PeerUnavailable: the connection ended before the answer did")

    # Called by httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            try:
                self._answer.retry_after_s = float(value)
            except ValueError:
                self._answer.retry_after_s = None  # a date: nobody here waits for one

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._status = self._parser.get_status_code()
        self._keeps_alive = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        if self._status != 200:
            self._body.append(body)
            return
        *lines, self._buffer = (self._buffer + body).split(b"\n")
        now_s = time.monotonic()
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now_s)

    def on_message_complete(self) -> None:
        if self._status != 200:
            is_told_when = self._answer.retry_after_s is not None
            self._answer.is_refused = self._status == TOO_MANY_REQUESTS or (self._status == SERVICE_UNAVAILABLE and is_told_when)
            text = b"".join(self._body).decode(errors="replace")
            self._end(f"HTTP {self._status}: {text[:500]}")
        else:
            self._end("" if self._is_done else "InvalidAnswer: the stream ended without [DONE]")

    def _take(self, data: bytes, now_s: float) -> None:
        answer = self._answer
        if data == b"[DONE]":
            self._is_done = answer.is_complete = True
            return
        try:
            event: dict[str, Any] = json.loads(data)
        except ValueError:
            answer.error = answer.error or "InvalidAnswer: an event is no JSON"
            return
        if "error" in event:
            answer.error = json.dumps(event["error"])[:500]
        for choice in event.get("choices") or ():
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            tokens = choice.get("token_ids")
            if text or tokens:
                # Without token ids a chunk counts as one token; the usage at the end says how many they were.
                answer.token_times.append((now_s, len(tokens) if tokens else 1))
                answer.content.update(text.encode())
        if usage := event.get("usage"):
            answer.input_tokens, answer.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens") or 0
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if timings := (event.get("baton") or {}).get("timings"):
            answer.timing = timings[0]

    def _end(self, error: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._answer.error = self._answer.error or error
            self._answer.is_complete = self._answer.is_complete and not self._answer.error
            self._ended.set_result(None)
