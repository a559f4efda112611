"""Failpoints: what arms them, what they do, and that a process without them has none."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.core.errors import ConfigurationError, PeerUnavailable
from services.mesh import failpoints
from services.mesh.failpoints import BLOCK_POINTS, STEP_POINTS, Arming
from services.mesh.server import ProcessSettings

POINT = "prefill.mid_prefill"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Failpoints are on, and nothing is armed."""
    failpoints.enable(tmp_path)
    yield tmp_path
    failpoints.enable(None)


def test_point_when_armed_with_an_error_raises_it_once(folder: Path) -> None:
    failpoints.hit(POINT)
    (folder / POINT).write_text("error\n")
    failpoints.hit("prefill.accepted")
    with pytest.raises(PeerUnavailable, match=POINT):
        failpoints.hit(POINT)
    assert not (folder / POINT).exists()
    failpoints.hit(POINT)


def test_point_when_armed_for_the_nth_hit_of_a_request_counts_only_its_own(folder: Path) -> None:
    (folder / POINT).write_text("error@3 mine")
    for request_id in ("mine", "other", "mine", "other", ""):
        failpoints.hit(POINT, request_id)
    with pytest.raises(PeerUnavailable):
        failpoints.hit(POINT, "mine")


@pytest.mark.parametrize("text", ["pause@2", "pause", "error", "sleep:0.1"])
def test_point_when_disarmed_just_as_somebody_comes_by_stays_disarmed(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    # It was armed again by whoever counted it down, and a request that came later stood there for good: once in some hundred cells.
    point = folder / "decode.started"
    point.write_text(text)
    parse = failpoints.Arming.parse

    def parse_and_disarm(name: str, text: str) -> failpoints.Arming:
        point.unlink()
        return parse(name, text)

    monkeypatch.setattr(failpoints.Arming, "parse", parse_and_disarm)
    failpoints.hit("decode.started", "request-1")
    assert list(folder.iterdir()) == []


def test_pause_on_a_task_lets_the_loop_go_on_until_it_is_taken_away(folder: Path) -> None:
    async def main() -> None:
        (folder / POINT).write_text("pause")
        paused = asyncio.ensure_future(failpoints.reach(POINT))
        done, _ = await asyncio.wait([paused], timeout=0.05)
        assert not done and not (folder / POINT).exists()
        (folder / f"{POINT}.paused").unlink()
        async with asyncio.timeout(10):
            await paused

    asyncio.run(main())


def test_pause_on_a_thread_holds_that_thread_until_it_is_taken_away(folder: Path) -> None:
    (folder / POINT).write_text("pause")
    thread = threading.Thread(target=failpoints.hit, args=(POINT,))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    (folder / f"{POINT}.paused").unlink()
    thread.join(10)
    assert not thread.is_alive()


def test_sleep_holds_up_whoever_comes_by(folder: Path) -> None:
    (folder / POINT).write_text("sleep:0.05")
    started = time.monotonic()
    failpoints.hit(POINT)
    (folder / POINT).write_text("sleep:0.05")
    asyncio.run(failpoints.reach(POINT))
    assert time.monotonic() - started >= 0.1


@pytest.mark.parametrize("point", BLOCK_POINTS)
def test_block_when_corrupted_differs_in_one_byte_and_is_not_the_pool(folder: Path, point: str) -> None:
    pool = bytearray(range(64))
    block = memoryview(pool)
    assert failpoints.on_wire(point, block) is block
    (folder / point).write_text("corrupt@2")
    assert failpoints.on_wire(point, block) is block
    damaged = failpoints.on_wire(point, block)
    assert sum(sent != own for sent, own in zip(damaged, range(64), strict=True)) == 1
    assert pool == bytearray(range(64))
    (folder / point).write_text("drop")
    assert len(failpoints.on_wire(point, block)) == 0
    assert failpoints.on_wire(point, block) is block


@pytest.mark.parametrize(
    ("point", "text", "words"),
    [
        ("prefill.mid_lunch", "kill", "'prefill.mid_lunch'; there are decode.at_end, "),
        (POINT, "explode", "'explode' is not .* kill, stop, term, sleep:SECONDS, pause, error"),
        (POINT, "corrupt", "'corrupt' is not"),
        (POINT, "sleep", "'sleep' is not"),
        (POINT, "kill:3", "'kill:3' is not"),
        (POINT, "kill@0", "'kill@0' is not"),
        ("kv.tcp_block", "kill", "'kill' is not .* corrupt, drop"),
    ],
)
def test_enable_when_a_file_arms_nothing_refuses(tmp_path: Path, point: str, text: str, words: str) -> None:
    (tmp_path / point).write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        failpoints.enable(tmp_path)
    (tmp_path / point).unlink()
    (tmp_path / POINT).write_text("kill")
    with pytest.raises(ConfigurationError, match="no folder"):
        failpoints.enable(tmp_path / "nowhere")
    failpoints.hit(POINT)  # nothing was switched on


def test_arming_when_written_and_read_is_the_same() -> None:
    for arming in (
        Arming(action="kill"),
        Arming(action="sleep", seconds=0.25, nth=7),
        Arming(action="pause", nth=2, request_id="request-1"),
    ):
        assert Arming.parse(POINT, str(arming)) == arming


def test_points_have_names_of_their_own() -> None:
    assert len(set(STEP_POINTS + BLOCK_POINTS)) == len(STEP_POINTS + BLOCK_POINTS)


async def serve(settings: ProcessSettings, stop: asyncio.Event) -> None:
    """What this file runs as a process: comes by one point."""
    failpoints.hit(POINT)


def run_here(**environment: str) -> subprocess.CompletedProcess[str]:
    code = "from services.mesh.server import ProcessSettings, run_process\nfrom tests.unit.mesh.test_failpoints import serve\n"
    return subprocess.run(
        [sys.executable, "-c", f"{code}run_process('test', ProcessSettings, serve)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_process_when_its_setting_arms_a_signal_dies_of_it_and_without_the_setting_does_not(tmp_path: Path) -> None:
    (tmp_path / POINT).write_text("kill")
    assert run_here().returncode == 0
    assert run_here(BATON_FAILPOINTS=str(tmp_path)).returncode == -signal.SIGKILL
    (tmp_path / POINT).write_text("bill")
    refused = run_here(BATON_FAILPOINTS=str(tmp_path))
    assert refused.returncode == 2
    assert "'bill' is not ACTION" in refused.stderr
