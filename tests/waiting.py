"""Waiting for what a real process or a task will do: polls, and fails with a word when it takes too long."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable


async def wait_until(condition: Callable[[], object | Awaitable[object]], timeout_s: float = 30.0) -> float:
    """Seconds that passed until `condition()` held. Raises AssertionError after `timeout_s`."""
    started = time.monotonic()
    while True:
        result = condition()
        if inspect.isawaitable(result):
            result = await result
        if result:
            return time.monotonic() - started
        assert time.monotonic() - started < timeout_s, f"still not so after {timeout_s} s"
        await asyncio.sleep(0.005)
