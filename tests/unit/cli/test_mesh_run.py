"""A mesh of stand-ins from its start to its end: the work's result, signals once and twice, signals in the start."""

import asyncio
import io
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from services.cli.mesh_plan import MeshPlan
from services.cli.mesh_run import run_mesh
from services.cli.start_board import StartBoard
from services.core.errors import Overloaded, PeerUnavailable
from tests.unit.cli.standins import is_alive, spec
from tests.waiting import wait_until

NAMES = {"redis": "redis", "kv_index": "kv_index", "prefill-0": "prefill", "decode-0": "decode", "router-0": "router"}


@pytest.fixture(autouse=True)
def heed_signals() -> Iterator[None]:
    """Whoever runs the tests in the background of a shell ignores interrupts."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(folder: Path, work: Callable[[], Coroutine[Any, Any, None]], console: Console | None = None, **behaviours: str) -> None:
    """Runs the work on a mesh; `behaviours` by role."""
    specs = [spec(folder, name, role, behaviours.get(role, "")) for name, role in NAMES.items()]
    plan = MeshPlan(model_name="demo", specs=specs, routers=[], http=[], worker_ids=[], stop_timeout_s=60.0)
    try:
        run_mesh(plan, log_dir=folder, board=StartBoard(list(NAMES), console or Console(file=io.StringIO())), work=work)
    finally:
        assert not any(is_alive(int(path.read_text())) for path in folder.glob("pid-*"))


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


async def nothing() -> None:
    """Work that is done at once."""


def test_mesh_when_the_work_is_done_stops_those_who_take_requests_first_and_redis_last(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    run(tmp_path, nothing, console)
    ended = (tmp_path / "ended").read_text().split()
    assert ended[0] == "router-0" and sorted(ended[1:3]) == ["decode-0", "prefill-0"] and ended[3:] == ["kv_index", "redis"]
    assert printed(console).index("redis      serving") < printed(console).index("router-0   starting"), "the others lean on Redis"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_mesh_when_signalled_during_the_work_drains_and_ends_as_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    async def work() -> None:
        os.kill(os.getpid(), number)
        await asyncio.Event().wait()

    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, work, console)
    assert printed(console).count("stopping; a second signal kills") == 1
    assert sorted((tmp_path / "ended").read_text().split()) == sorted(NAMES), "everybody has been asked, nobody was killed"


def test_mesh_when_signalled_twice_kills_whoever_still_drains(tmp_path: Path) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        os.kill(os.getpid(), signal.SIGINT)
        loop.call_later(0.3, os.kill, os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, work, decode="deaf")  # it would drain for a minute
    assert (tmp_path / "ended").read_text().split() == ["router-0", "prefill-0"]


def test_mesh_when_signalled_in_the_start_ends_at_once(tmp_path: Path) -> None:
    async def probe() -> bool:
        await wait_until(lambda: (tmp_path / "pid-prefill-0").exists())
        if not (tmp_path / "signalled").exists():
            (tmp_path / "signalled").touch()
            os.kill(os.getpid(), signal.SIGINT)
        return False

    specs = [spec(tmp_path, "redis", "redis"), replace(spec(tmp_path, "prefill-0", "prefill", "deaf"), is_serving=probe)]
    plan = MeshPlan(model_name="demo", specs=specs, routers=[], http=[], worker_ids=[], stop_timeout_s=60.0)
    with pytest.raises(KeyboardInterrupt):
        run_mesh(plan, log_dir=tmp_path, board=StartBoard([], Console(file=io.StringIO())), work=nothing)
    assert not any(is_alive(int(path.read_text())) for path in tmp_path.glob("pid-*"))
    assert not (tmp_path / "ended").exists()


def test_mesh_when_told_to_ignore_hangups_goes_on(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does

    async def work() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.1)
        (tmp_path / "worked").touch()

    run(tmp_path, work)
    assert (tmp_path / "worked").exists()


def test_mesh_when_the_work_fails_drains_and_passes_the_error_on(tmp_path: Path) -> None:
    async def work() -> None:
        raise Overloaded("no room")

    with pytest.raises(Overloaded, match="no room"):
        run(tmp_path, work)
    assert len((tmp_path / "ended").read_text().split()) == len(NAMES)


def test_mesh_when_a_process_dies_in_the_start_never_begins_the_work(tmp_path: Path) -> None:
    async def work() -> None:
        raise AssertionError("the mesh was never up")

    with pytest.raises(PeerUnavailable, match="kv_index exited with status 3"):
        run(tmp_path, work, kv_index="crash")
