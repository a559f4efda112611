"""`loadtest run` against servers whose behaviour is known, and against a mesh: what it reports is what they did."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.micro.processes import free_port
from loadtest.records import Outcome
from loadtest.result import load_result
from loadtest.schedule import Schedule
from services.mesh.child_process import bound_to_parent

ROOT = Path(__file__).parents[2]
TTFT_MS, ITL_MS = 50.0, 10.0


@contextlib.contextmanager
def stub_server(ttft_ms: float = TTFT_MS, itl_ms: float = ITL_MS) -> Iterator[tuple[str, int]]:
    """Its URL and its process."""
    port = free_port()
    command = [sys.executable, "-m", "tests.stub_server", str(port), str(ttft_ms), str(itl_ms)]
    with subprocess.Popen(bound_to_parent(command), cwd=ROOT, process_group=0) as process:
        try:
            url = f"http://127.0.0.1:{port}/v1"
            deadline = time.monotonic() + 30.0
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/models", timeout=1.0):
                    break
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            yield url, process.pid
        finally:
            process.kill()


def wait_asked(url: str, num_requests: int) -> None:
    """Until the server has been asked so often."""
    deadline = time.monotonic() + 60.0
    while True:
        with urllib.request.urlopen(f"{url}/asked", timeout=10.0) as response:
            if json.load(response) >= num_requests:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def loadtest(*arguments: object, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtest", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


def run_json(*arguments: object) -> dict[str, Any]:
    """The result of a run; also of one that is not valid because this machine was too busy to send in time."""
    done = loadtest("run", *arguments, "--json", "--no-live")
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert not [problem for problem in found["verdict"]["problems"] if "send lag" not in problem], found["verdict"]
    return found


GENERATED = ("generated", "--scale", 32, "--seed", 3)


def test_run_when_the_server_has_a_fixed_latency_reports_it(tmp_path: Path) -> None:
    with stub_server() as (url, _):
        found = run_json(*GENERATED, "--rate", 20, "--requests", 80, "--target", url, "-o", tmp_path / "r.json")
    summary = found["summary"]
    assert summary["completed"] == summary["offered"] == 80
    # Medians: a busy machine delays some answers, not most.
    assert summary["ttft_as_sent_ms"]["p50"] == pytest.approx(TTFT_MS, rel=0.1)
    assert summary["tpot_ms"]["p50"] == pytest.approx(ITL_MS, rel=0.05)
    assert summary["itl_ms"]["p50"] == pytest.approx(ITL_MS, rel=0.1)
    result, records = load_result(tmp_path / "r.json")
    assert result.schedule.requests == len(records) == 80
    assert (tmp_path / "r.schedule.jsonl.gz").exists()
    # The schedule that was stored sends the same again.
    with stub_server() as (url, _):
        again = run_json(tmp_path / "r.schedule.jsonl.gz", "--target", url, "--requests", 80)
    assert again["schedule"]["digest"] == result.schedule.digest


def test_run_when_the_server_freezes_counts_the_wait_from_the_intended_times(tmp_path: Path) -> None:
    """Frozen for 3 of 15 s: what a client that waits with sending hides. Odds of a false alarm: none known, the frozen time is real."""
    with stub_server() as (url, pid):
        command = [sys.executable, "-m", "loadtest", "run", *map(str, GENERATED), "--rate", "20", "--seconds", "15", "--target", url]
        command += ["--json", "--no-live", "-o", str(tmp_path / "r.json")]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            wait_asked(url, 80)  # of 20 a second: four seconds
            os.kill(pid, signal.SIGSTOP)
            time.sleep(3.0)
            os.kill(pid, signal.SIGCONT)
            stdout, stderr = process.communicate(timeout=120.0)
    summary = json.loads(stdout)["summary"]
    assert summary["completed"] == summary["offered"], stderr.decode()
    assert summary["ttft_ms"]["p99"] >= 2500.0
    assert summary["ttft_ms"]["p50"] < 200.0
    _, records = load_result(tmp_path / "r.json")
    waited = [record for record in records if (record.ttft_s or 0.0) > 1.0]
    assert len(waited) >= 20  # two seconds' worth of twenty a second


def test_run_when_requests_fail_counts_them_as_offered(tmp_path: Path) -> None:
    """A server that dies half-way: the rest failed, and nothing hangs."""
    with stub_server() as (url, pid):
        command = [sys.executable, "-m", "loadtest", "run", *map(str, GENERATED), "--rate", "20", "--seconds", "6", "--target", url]
        command += ["--json", "--no-live", "-o", str(tmp_path / "r.json")]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            wait_asked(url, 60)  # of 20 a second for six seconds
            os.kill(pid, signal.SIGKILL)
            stdout, stderr = process.communicate(timeout=60.0)
    summary = json.loads(stdout)["summary"]
    assert summary["failed"] > 0 and summary["completed"] > 0, stderr.decode()
    assert summary["completed"] + summary["failed"] == summary["offered"]
    assert summary["attainment"] <= summary["completed"] / summary["offered"]
    _, records = load_result(tmp_path / "r.json")
    assert all(record.error.startswith("PeerUnavailable") for record in records if record.outcome is Outcome.FAILED)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "ftp://x"), "--target: 'ftp://x' is neither"),
        (("--target", "grpc://nowhere"), "--target: 'grpc://nowhere' is not grpc://host:port"),
        (("--target", f"http://127.0.0.1:{free_port()}/v1"), "refused"),
        (("--fault", "stab:decode@3"), "--fault: 'stab:decode@3' is not KIND:WHO@AT"),
        (("--header", "nonsense", "--target", "http://127.0.0.1:1/v1"), "--header: 'nonsense' is not 'name: value'"),
        (("--capacity", "0.9", "--fault", "kill:decode@3"), "--capacity searches without faults"),
    ],
)
def test_run_when_it_is_asked_wrongly_says_what_is_wrong(arguments: tuple[str, ...], words: str) -> None:
    done = loadtest("run", "generated", "--requests", 3, *arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_run_when_sessions_wait_counts_each_turn_from_the_answer_before_and_the_thinking(tmp_path: Path) -> None:
    with stub_server() as (url, _):
        options = ("--sessions", "--think", 0.2, "--rate", 10, "--requests", 40, "--target", url, "-o", tmp_path / "r.json", "--senders", 3)
        run_json(*GENERATED, *options)
    schedule = Schedule.load(tmp_path / "r.schedule.jsonl.gz")
    _, records = load_result(tmp_path / "r.json")
    turns = [(request, record) for request, record in zip(schedule.requests, records, strict=True) if request.after is not None]
    assert len(turns) >= 5
    for request, record in turns:
        assert request.after is not None
        answered_s = records[request.after].finished_s
        assert answered_s is not None and record.at_s == pytest.approx(answered_s + request.think_s)
        assert record.sent_s is not None and record.sent_s >= record.at_s
