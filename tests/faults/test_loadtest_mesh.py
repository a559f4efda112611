"""`loadtest run` against `baton up`: what it sees inside a mesh, and what killed workers cost. Alone on the machine, as all tests here."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.micro.processes import free_port
from loadtest.result import load_result
from services.mesh.child_process import bound_to_parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of workers by their sockets")

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120.0
# Small prompts of the demo model's block size, two a second: far below what two processor cores do.
WORKLOAD = ("generated", "--scale", "64", "--seed", "3", "--rate", "2")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Addresses of a router's gRPC and HTTP: one prefill and two decode workers."""
    folder = tmp_path_factory.mktemp("mesh")
    port, http_port = free_port(), free_port()
    command = ["-m", "services.cli", "up", "--prefill", "1", "--decode", "2", "--port", str(port), "--http-port", str(http_port)]
    command += ["--set", "router.max_local_tokens=32"]  # an idle decode worker would rather compute most of these prompts itself
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = folder / "up.txt"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            bound_to_parent([sys.executable, *command]), cwd=folder, env=environment, stdout=output, stderr=output, process_group=0
        ) as process,
    ):
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while "is served at" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield f"127.0.0.1:{port}", f"127.0.0.1:{http_port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60.0)


def run(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "loadtest", "run", *WORKLOAD, *map(str, arguments), "--json", "--no-live"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180.0)
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    # A machine that others use may hold a sender up; nothing else is forgiven.
    assert not [problem for problem in found["verdict"]["problems"] if "send lag" not in problem], found["verdict"]
    return found


@pytest.mark.parametrize("is_http", [False, True])
def test_run_when_the_target_is_a_mesh_sees_inside_it(mesh: tuple[str, str], is_http: bool, tmp_path: Path) -> None:
    grpc, http = mesh
    target = ["--target", f"http://{http}/v1", "--router", grpc] if is_http else ["--target", f"grpc://{grpc}"]
    found = run("--seconds", 8, *target, "-o", tmp_path / "r.json", "--html", tmp_path / "r.html")
    summary, cluster = found["summary"], found["cluster"]
    assert summary["completed"] == summary["offered"] > 8
    assert (cluster["prefill_workers"], cluster["decode_workers"], cluster["block_size"]) == (1, 2, 16)
    # Stages are the router's, decode's and prefill's; the sums are the client's own times.
    assert summary["residual_within"] >= 0.99
    assert summary["stages_ms"]["prefill"]["p50"] > 0.0 and summary["stages_ms"]["decode"]["p50"] > 0.0
    assert summary["kv_bytes"] == summary["kv_bytes_expected"] > 0
    assert 0.0 <= summary["reuse"] <= found["ceilings"]["infinite"]
    assert "Where the time goes" in (tmp_path / "r.html").read_text()
    _, records = load_result(tmp_path / "r.json")
    assert {record.decode_worker_id for record in records} <= {"decode-0", "decode-1"}
    assert "prefill-0" in {record.prefill_worker_id for record in records}


def test_run_when_workers_are_killed_and_frozen_loses_nothing_and_says_what_it_cost(mesh: tuple[str, str]) -> None:
    target = ["--target", f"grpc://{mesh[0]}"]
    found = run("--seconds", 18, *target, "--fault", "kill:decode,prefill@2/5", "--fault", "freeze=3:decode@14")
    exactness = found["exactness"]
    assert exactness["compared"] == found["summary"]["offered"]
    assert (exactness["lost"], exactness["wrong"], exactness["duplicated"], exactness["leaked_blocks"]) == (0, 0, 0, 0)
    kinds = [(mark["kind"], mark["worker_id"].partition("-")[0]) for mark in found["faults"]]
    assert kinds.count(("kill", "decode")) >= 1 and kinds.count(("kill", "prefill")) >= 1
    # A worker that is killed is missed at once, one that is frozen after its heartbeat has been overdue.
    for mark in found["faults"]:
        assert mark["detected_s"] is not None and mark["detected_s"] < (5.0 if mark["kind"] == "freeze" else 1.5), mark


def test_run_when_nobody_has_the_name_of_the_struck_says_who_there_is(mesh: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "loadtest", "run", *WORKLOAD, "--seconds", "2", "--target", f"grpc://{mesh[0]}", "--fault"]
    done = subprocess.run([*command, "kill:nobody@1"], cwd=ROOT, capture_output=True, text=True, timeout=60.0)
    assert done.returncode == 2 and "--fault: 'nobody' is neither a worker nor a role; there are decode, decode-0" in done.stderr
