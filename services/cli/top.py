"""`baton top`: a router's status on the terminal, again and again until Ctrl-C."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated

import grpc
import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from protos.baton.v1 import status_pb2, status_pb2_grpc
from services.cli.remote import DEFAULT_ROUTER, Router, check_address, explain
from services.cli.top_view import view
from services.core.errors import BatonError, InvalidRequest, PeerUnavailable
from services.mesh.client import open_channel

RECONNECT_S = 1.0


def top(
    router: Router = DEFAULT_ROUTER,
    interval: Annotated[float, typer.Option(help="Seconds between two views, 0.1 … 60.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one view, of two samples, and exit.")] = False,
) -> None:
    """Shows what a mesh is doing: workers, queues, batches, KV blocks, rates and latencies."""
    check_address(router)
    if not 0.1 <= interval <= 60:
        raise InvalidRequest("--interval", f"{interval} is outside [0.1, 60]", limit="[0.1, 60]")
    console = Console(highlight=False)
    if once:
        asyncio.run(_show_once(console, router, interval))
        return
    # Whoever watches leaves with Ctrl-C: that is no failure.
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_show_forever(console, router, interval))


async def samples(router: str, interval_s: float) -> AsyncGenerator[status_pb2.WatchStatusResponse, None]:
    """The router's status at once and then every `interval_s`. Raises PeerUnavailable when it goes away, and what it answers."""
    async with open_channel(router) as channel:
        call = status_pb2_grpc.StatusServiceStub(channel).WatchStatus(status_pb2.WatchStatusRequest(interval_s=interval_s))
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise explain(error, router) from error
        finally:
            call.cancel()
    raise PeerUnavailable(f"{router}: the router has stopped")


async def _show_once(console: Console, router: str, interval_s: float) -> None:
    async with contextlib.aclosing(samples(router, interval_s)) as stream:
        first, second = await anext(stream), await anext(stream)
    console.print(view(first, second, router=router))


async def _show_forever(console: Console, router: str, interval_s: float) -> None:
    before = now = None
    with Live(Text(f"waiting for {router}"), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            try:
                async with contextlib.aclosing(samples(router, interval_s)) as stream:
                    async for sample in stream:
                        before, now = now, sample
                        _draw(console, live, before, now, router, "")
            except InvalidRequest:
                raise
            except BatonError as error:
                _draw(console, live, before, now, router, f"{error.message}; trying again")
            await asyncio.sleep(RECONNECT_S)


def _draw(
    console: Console,
    live: Live,
    before: status_pb2.WatchStatusResponse | None,
    now: status_pb2.WatchStatusResponse | None,
    router: str,
    trouble: str,
) -> None:
    picture = Text(trouble) if now is None else view(before, now, router=router, trouble=trouble)
    if console.is_terminal:
        live.update(picture, refresh=True)
    else:
        # In a pipe the views follow one another.
        console.print(picture)
