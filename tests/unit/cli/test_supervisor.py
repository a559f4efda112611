"""The supervisor with real processes: the order of starts and stops, deaths, crash loops, and that nothing ever survives it."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.cli.supervisor import (
    CRASH_LOOP,
    FIRST_BACKOFF_S,
    LONGEST_BACKOFF_S,
    STEADY_S,
    Backoff,
    ProcessSpec,
    Supervisor,
    death_notice,
    how_it_ended,
)
from services.core.errors import PeerUnavailable
from tests.unit.cli.standins import is_alive, spec
from tests.waiting import wait_until

ROOT = Path(__file__).parents[3]


class Reports(list[tuple[str, str]]):
    """What a supervisor has said, in order."""

    def take(self, name: str, words: str) -> None:
        self.append((name, words))

    def of(self, name: str) -> list[str]:
        return [words for reported, words in self if reported == name]


def supervise(
    folder: Path,
    specs: Sequence[ProcessSpec],
    reports: Reports,
    *,
    stages: Sequence[Sequence[str]] = (("front",), ("back",)),
    **options: float,
) -> Supervisor:
    return Supervisor(specs, stages=stages, log_dir=folder, report=reports.take, **{"stop_timeout_s": 20.0, **options})


def test_supervisor_when_left_stops_stage_by_stage_and_leaves_nothing(tmp_path: Path) -> None:
    reports = Reports()

    async def run() -> dict[str, int]:
        specs = [spec(tmp_path, "b0", "back"), spec(tmp_path, "f0", "front"), spec(tmp_path, "f1", "front")]
        async with supervise(tmp_path, specs, reports) as supervisor:
            await supervisor.start("back")
            assert list(supervisor.pids) == ["b0"]
            await supervisor.start("front")
            supervisor.keep_alive()
            pids = supervisor.pids
            assert all(is_alive(pid) for pid in pids.values())
            # Ctrl-C in a terminal goes to the group that is in front, which is the supervisor's.
            assert {os.getpgid(pid) for pid in pids.values()} == set(pids.values())
        return pids

    pids = asyncio.run(run())
    assert sorted(pids) == ["b0", "f0", "f1"]
    assert not any(is_alive(pid) for pid in pids.values())
    ended = (tmp_path / "ended").read_text().split()
    assert sorted(ended[:2]) == ["f0", "f1"] and ended[2:] == ["b0"]
    assert reports.of("b0") == ["starting", reports.of("b0")[1], "stopped"]
    assert reports.of("b0")[1].startswith("serving after ")
    assert (tmp_path / "b0.log").read_text() == "started b0\n"


def test_supervisor_when_a_process_dies_in_the_start_says_its_last_words_and_ends_the_others(tmp_path: Path) -> None:
    async def run() -> None:
        async with supervise(tmp_path, [spec(tmp_path, "good", "back"), spec(tmp_path, "bad", "front", "crash")], Reports()) as supervisor:
            await supervisor.start("back")
            await supervisor.start("front")
            raise AssertionError("it has started")

    with pytest.raises(PeerUnavailable) as raised:
        asyncio.run(run())
    assert "bad exited with status 3" in raised.value.message
    assert raised.value.message.endswith("started bad\n    cannot go on")
    assert not is_alive(int((tmp_path / "pid-good").read_text()))


def test_supervisor_when_what_waits_for_the_start_is_elsewhere_still_notices_a_death(tmp_path: Path) -> None:
    async def run() -> None:
        async with supervise(tmp_path, [spec(tmp_path, "a", "back")], Reports()) as supervisor:
            await supervisor.start("back")
            os.kill(supervisor.pids["a"], signal.SIGKILL)
            await asyncio.Event().wait()

    with pytest.raises(PeerUnavailable, match="a killed by SIGKILL"):
        asyncio.run(run())


def test_supervisor_when_a_running_process_is_killed_starts_it_again(tmp_path: Path) -> None:
    reports = Reports()

    async def run() -> None:
        async with supervise(tmp_path, [spec(tmp_path, "a", "back"), spec(tmp_path, "b", "back")], reports) as supervisor:
            await supervisor.start("back")
            supervisor.keep_alive()
            first = supervisor.pids
            (tmp_path / "serving-a").unlink()
            os.kill(first["a"], signal.SIGKILL)
            await wait_until(lambda: len([words for words in reports.of("a") if words.startswith("serving")]) == 2)
            assert supervisor.pids["a"] != first["a"] and supervisor.pids["b"] == first["b"]

    asyncio.run(run())
    assert f"killed by SIGKILL; starts again in {FIRST_BACKOFF_S:g} s" in reports.of("a")
    assert (tmp_path / "a.log").read_text() == "started a\n" * 2


def test_supervisor_when_its_log_folder_is_gone_starts_processes_again_all_the_same(tmp_path: Path) -> None:
    """A cleaner of temporary folders must not end a mesh."""
    reports, logs = Reports(), tmp_path / "logs"
    logs.mkdir()
    specs = [spec(tmp_path, "a", "back")]

    async def run() -> None:
        async with Supervisor(specs, stages=(("back",),), log_dir=logs, report=reports.take, stop_timeout_s=10.0) as supervisor:
            await supervisor.start("back")
            supervisor.keep_alive()
            shutil.rmtree(logs)
            (tmp_path / "serving-a").unlink()
            os.kill(supervisor.pids["a"], signal.SIGKILL)
            await wait_until(lambda: len([words for words in reports.of("a") if words.startswith("serving")]) == 2)

    asyncio.run(run())


def test_supervisor_when_a_process_dies_again_and_again_reports_a_crash_loop_and_goes_on(tmp_path: Path) -> None:
    reports = Reports()

    async def run() -> None:
        async with supervise(tmp_path, [spec(tmp_path, "a", "back")], reports) as supervisor:
            await supervisor.start("back")
            supervisor.keep_alive()
            (tmp_path / "crash-a").touch()
            os.kill(supervisor.pids["a"], signal.SIGKILL)
            await wait_until(lambda: any("crash loop" in words for words in reports.of("a")))
            # Whatever was wrong has been mended.
            (tmp_path / "serving-a").unlink()
            (tmp_path / "crash-a").unlink()
            await wait_until(lambda: reports.of("a")[-1].startswith("serving"))

    asyncio.run(run())
    [loop] = [words for words in reports.of("a") if "crash loop" in words]
    assert f"died {CRASH_LOOP} times in a row" in loop and loop.endswith("cannot go on")


def test_supervisor_when_a_process_ignores_sigterm_kills_it_after_the_timeout(tmp_path: Path) -> None:
    reports = Reports()

    async def run() -> int:
        async with supervise(tmp_path, [spec(tmp_path, "a", "back", "deaf")], reports, stop_timeout_s=0.3) as supervisor:
            await supervisor.start("back")
            supervisor.keep_alive()
            return supervisor.pids["a"]

    assert not is_alive(asyncio.run(run()))
    assert "has not stopped within 0.3 s: killed" in reports.of("a")


def test_supervisor_when_a_process_takes_long_to_stop_says_that_it_drains_and_waits(tmp_path: Path) -> None:
    reports = Reports()

    async def run() -> None:
        async with supervise(tmp_path, [spec(tmp_path, "a", "back", "slow"), spec(tmp_path, "b", "back")], reports) as supervisor:
            await supervisor.start("back")
            supervisor.keep_alive()

    asyncio.run(run())
    assert reports[-3:] == [("b", "stopped"), ("a", "draining"), ("a", "stopped")]
    assert (tmp_path / "ended").read_text().split() == ["b", "a"]


def test_supervisor_when_killed_from_within_a_drain_ends_it(tmp_path: Path) -> None:
    async def run() -> int:
        supervisor = supervise(tmp_path, [spec(tmp_path, "a", "back", "deaf")], Reports(), stop_timeout_s=60.0)
        async with supervisor:
            await supervisor.start("back")
            supervisor.keep_alive()
            pid = supervisor.pids["a"]
            asyncio.get_running_loop().call_later(0.2, supervisor.kill)
        return pid

    async def in_time() -> int:
        async with asyncio.timeout(20):
            return await run()

    assert not is_alive(asyncio.run(in_time()))


def test_supervisor_when_cancelled_in_the_start_ends_everything_at_once(tmp_path: Path) -> None:
    reports = Reports()

    async def run() -> None:
        async with supervise(tmp_path, [spec(tmp_path, "a", "back", "deaf"), spec(tmp_path, "b", "back", "never")], reports) as supervisor:
            this_task = asyncio.current_task()
            assert this_task is not None

            async def cancel() -> None:
                await wait_until(lambda: (tmp_path / "pid-a").exists() and (tmp_path / "pid-b").exists())
                this_task.cancel()

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(cancel())
                await supervisor.start("back")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert {words for _, words in reports if not words.startswith("serving")} == {"starting"}, "nobody was asked to drain"
    assert not any(is_alive(int((tmp_path / f"pid-{name}").read_text())) for name in "ab")


def test_supervisor_when_the_work_fails_stops_everything_and_passes_the_error_on(tmp_path: Path) -> None:
    async def run() -> None:
        async with supervise(tmp_path, [spec(tmp_path, "a", "back")], Reports()) as supervisor:
            await supervisor.start("back")
            supervisor.keep_alive()
            raise PeerUnavailable("the work")

    with pytest.raises(PeerUnavailable, match="the work"):
        asyncio.run(run())
    assert (tmp_path / "ended").read_text() == "a\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_supervisor_when_killed_itself_takes_its_processes_with_it(tmp_path: Path) -> None:
    program = """
import asyncio, pathlib, sys
from services.cli.supervisor import Supervisor
from tests.unit.cli.standins import spec
folder = pathlib.Path(sys.argv[1])
async def run():
    async with Supervisor([spec(folder, "a", "r", "deaf")], stages=[["r"]], log_dir=folder, report=print, stop_timeout_s=9) as supervisor:
        await supervisor.start("r")
        supervisor.keep_alive()
        (folder / "ready").touch()
        await asyncio.Event().wait()
asyncio.run(run())
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        asyncio.run(wait_until(lambda: (tmp_path / "ready").exists(), timeout_s=30))
        pid = int((tmp_path / "pid-a").read_text())
        assert is_alive(pid)
        process.kill()
    asyncio.run(wait_until(lambda: not is_alive(pid)))


def test_supervisor_when_it_starts_a_process_gives_it_its_environment_and_no_other(tmp_path: Path) -> None:
    program = "import json, os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(json.dumps(dict(os.environ))); time.sleep(60)"
    seen = tmp_path / "environment"

    async def is_written() -> bool:
        return seen.exists() and seen.read_text().endswith("}")

    async def run() -> None:
        one = ProcessSpec(
            name="a",
            role="back",
            command=(sys.executable, "-I", "-S", "-c", program, str(seen)),
            environment={"BATON_LISTEN": "here"},
            is_serving=is_written,
        )
        async with supervise(tmp_path, [one], Reports()) as supervisor:
            await supervisor.start("back")

    asyncio.run(run())
    # Python itself adds LC_CTYPE in a C locale.
    assert seen.read_text() in ('{"BATON_LISTEN": "here"}', '{"BATON_LISTEN": "here", "LC_CTYPE": "C.UTF-8"}')


def test_backoff_when_deaths_come_early_doubles_up_to_its_limit_and_starts_anew_after_a_long_life() -> None:
    backoff = Backoff()
    assert [backoff.after(0.1) for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, LONGEST_BACKOFF_S, LONGEST_BACKOFF_S]
    assert backoff.num_young_deaths == 8
    assert backoff.after(STEADY_S) == FIRST_BACKOFF_S
    assert backoff.num_young_deaths == 1
    assert Backoff().after(STEADY_S - 0.1) == FIRST_BACKOFF_S


def test_death_notice_when_deaths_repeat_says_each_at_first_and_then_every_fifth() -> None:
    notices = {deaths: death_notice(deaths, -9, 0.4) for deaths in range(1, 16)}
    assert notices[1] == notices[4] == "killed by SIGKILL; starts again in 0.4 s"
    assert {deaths for deaths, words in notices.items() if words is None} == {6, 7, 8, 9, 11, 12, 13, 14}
    assert notices[10] == "crash loop: died 10 times in a row, starts again in 0.4 s"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exited with status 0"),
        (3, "exited with status 3"),
        (-9, "killed by SIGKILL"),
        (-11, "killed by SIGSEGV"),
        (-99, "killed by signal 99"),
    ],
)
def test_end_when_told_names_the_status_or_the_signal(status: int, words: str) -> None:
    assert how_it_ended(status) == words
