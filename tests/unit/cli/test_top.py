"""`baton top` as a process against a real status stream: one view, views in a pipe, a router that goes and comes."""

import asyncio
import signal
import socket

import pytest

from protos.baton.v1 import status_pb2
from services.cli.ports import ReservedPorts
from tests.unit.cli.scripted_router import ScriptedRouter, baton, serving, start_baton


def status(number: int) -> status_pb2.WatchStatusResponse:
    return status_pb2.WatchStatusResponse(router_id="router-0", model_name="demo", uptime_s=number, output_tokens=100 * number)


def test_top_when_once_prints_one_view_of_two_samples() -> None:
    router = ScriptedRouter(statuses=(status(1), status(2), status(3)))

    async def run() -> tuple[int, str, str]:
        async with serving(router) as server:
            result = await baton("top", "--router", server.address, "--once", "--interval", "0.5")
        return result.status, result.out, result.err

    code, out, err = asyncio.run(run())
    assert (code, err) == (0, "")
    assert out.count("router-0 at ") == 1 and "up 0:02" in out and "out 100 tokens/s" in out
    assert [request.interval_s for request in router.requests] == [0.5]


def test_top_when_the_router_goes_and_comes_says_so_and_goes_on_until_interrupted() -> None:
    async def run() -> tuple[int | None, str, str]:
        with ReservedPorts() as ports:
            address = f"127.0.0.1:{ports.take()}"
            process = await start_baton("top", "--router", address)
            assert process.stdout is not None
            seen = ""

            async def read_until(words: str) -> None:
                nonlocal seen
                assert process.stdout is not None
                while words not in " ".join(seen.split()):  # lines are wrapped
                    piece = await process.stdout.read(1 << 16)
                    assert piece, seen
                    seen += piece.decode()

            async with asyncio.timeout(60):
                await read_until("no router answers there; `baton up` starts one; trying again")
                async with serving(ScriptedRouter(statuses=(status(1), status(2))), address):
                    await read_until("up 0:02")
                seen = ""
                await read_until("; trying again")
                kept = seen
                async with serving(ScriptedRouter(statuses=(status(7),)), address):
                    await read_until("up 0:07")
                    process.send_signal(signal.SIGINT)
                    _, err = await process.communicate()
            return process.returncode, kept, err.decode()

    # Whoever runs the tests in the background of a shell ignores interrupts, and so would the child.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, kept, err = asyncio.run(run())
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, err) == (0, "")
    assert "up 0:02" in kept, "the last view stays while the router is away"


def test_top_when_once_and_nobody_answers_fails_like_any_command() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        result = asyncio.run(baton("top", "--router", address, "--once"))
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"error: {address}: ") and result.err.endswith("`baton up` starts one; try again in 1 s\n")


@pytest.mark.parametrize("interval", ["0.05", "61", "nan"])
def test_top_when_the_interval_is_out_of_its_limits_names_them(interval: str) -> None:
    result = asyncio.run(baton("top", "--interval", interval))
    assert (result.status, result.err) == (2, f"error: --interval: {float(interval)} is outside [0.1, 60]\n")
