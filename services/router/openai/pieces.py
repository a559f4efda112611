"""The pieces of several requests at once, as they come: all that is ready is shown together, so that one engine step costs one write."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from services.router.request import Delta, GenerationRequest, PromptLogprobs, Summary

Piece = Delta | PromptLogprobs | Summary
Generate = Callable[[GenerationRequest], AsyncGenerator[Piece, None]]
# Pieces that wait for a client that does not read; behind them the request's own stream fills, and has its bound.
MAX_WAITING = 256


async def follow_all(
    generate: Generate, requests: Sequence[GenerationRequest], show: Callable[[Sequence[tuple[int, Piece]]], Awaitable[None]]
) -> None:
    """Runs all requests to their ends; `show` gets (index of the request, piece), at least one, in the order of each request.

    When one fails, or showing does, the others are cancelled, and its error is raised, in a group if there were several.
    """
    if len(requests) == 1 and requests[0].sampling.n == 1:
        # A step brings one piece: there is nothing to wait for, and a task between would cost half as much again.
        async with contextlib.aclosing(generate(requests[0])) as pieces:
            async for piece in pieces:
                await show(((0, piece),))
        return
    inbox = _Inbox(len(requests))
    async with asyncio.TaskGroup() as tasks:
        for index, request in enumerate(requests):
            tasks.create_task(_follow(generate, index, request, inbox))
        while ready := await inbox.take():
            await show(ready)


async def _follow(generate: Generate, index: int, request: GenerationRequest, inbox: "_Inbox") -> None:
    # An error goes by way of the inbox: a group whose task fails while its body ends leaves this request's task cancelled for good (3.11).
    error: Exception | None = None
    try:
        async with contextlib.aclosing(generate(request)) as pieces:
            async for piece in pieces:
                inbox.put((index, piece))
                if inbox.is_full:
                    await inbox.wait_taken()
    except Exception as failure:
        error = failure
    inbox.end(error)


class _Inbox:
    """What has come and was not shown yet; one reader."""

    def __init__(self, num_open: int) -> None:
        self._pieces: list[tuple[int, Piece]] = []
        self._num_open = num_open
        self._error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None
        self._taken = asyncio.Event()

    @property
    def is_full(self) -> bool:
        return len(self._pieces) >= MAX_WAITING

    def put(self, piece: tuple[int, Piece]) -> None:
        self._pieces.append(piece)
        if self._reader is not None:
            self._wake()

    def end(self, error: Exception | None) -> None:
        """One request has ended."""
        self._num_open -= 1
        self._error = self._error or error
        if self._reader is not None:
            self._wake()

    async def wait_taken(self) -> None:
        while self.is_full:
            self._taken.clear()
            await self._taken.wait()

    async def take(self) -> list[tuple[int, Piece]]:
        """All that has come, at least one piece; none when all requests have ended. Raises what one has failed with, after its pieces."""
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if not self._num_open:
                return []
            self._reader = self._loop.create_future()
            await self._reader
        pieces, self._pieces = self._pieces, []
        self._taken.set()
        return pieces

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():  # done: it was cancelled
            reader.set_result(None)
