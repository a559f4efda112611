"""How an answer gets to its client: in one body, or event by event while it is made. ASGI; the bytes are made by responses.py."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.core.errors import DeadlineExceeded
from services.router.openai.pieces import Generate, Piece, follow_all
from services.router.openai.responses import Stream, Whole
from services.router.request import GenerationRequest

_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy must not collect what is meant to be seen at once
]


class WholeAnswer(Response):
    """Made when it is sent: everything before that can still fail with a status."""

    def __init__(self, generate: Generate, generation: Sequence[GenerationRequest], whole: Whole) -> None:
        self._generate = generate
        self._generation = generation
        self._whole = whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def show(pieces: Sequence[tuple[int, Piece]]) -> None:
            for prompt, piece in pieces:
                self._whole.take(prompt, piece)

        await _follow_until_deadline(self._generate, self._generation, show)
        await Response(self._whole.body(), media_type="application/json")(scope, receive, send)


class StreamedAnswer(Response):
    """Begins with the first piece, so that whoever is refused before it gets a status and not an event."""

    def __init__(self, generate: Generate, generation: Sequence[GenerationRequest], stream: Stream) -> None:
        self._generate = generate
        self._generation = generation
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._stream.events
        has_begun = False

        async def show(pieces: Sequence[tuple[int, Piece]]) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
            body = b"".join([events(prompt, piece) for prompt, piece in pieces])
            if body:
                # Waits while the transport is full: then the pieces wait, and their bounds hold.
                await send({"type": "http.response.body", "body": body, "more_body": True})

        await _follow_until_deadline(self._generate, self._generation, show)
        await send({"type": "http.response.body", "body": self._stream.end(), "more_body": False})


async def _follow_until_deadline(
    generate: Generate, generation: Sequence[GenerationRequest], show: Callable[[Sequence[tuple[int, Piece]]], Awaitable[None]]
) -> None:
    """Raises DeadlineExceeded, and what generate() raises, in groups."""
    first = generation[0]  # all came at once
    left_s = None if first.remaining_s is None else first.received_at + first.remaining_s - time.perf_counter()
    try:
        async with asyncio.timeout(left_s):
            await follow_all(generate, generation, show)
    except TimeoutError:
        raise DeadlineExceeded(f"the deadline of {first.remaining_s} s has passed") from None
