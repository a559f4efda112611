"""The command line with a real mesh, as a user has it: up, generate, top, a worker killed, Ctrl-C; a start that fails; the demo.

One mesh for all tests of `baton up`; the tests do not depend on each other's order. Processes are found by the directory that they
run in, so that "nothing is left" is about every process that came of a command, whoever started it.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.test_readme import ADDRESS, block

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

ROOT = Path(__file__).parents[2]
PROMPT = "import os\n\n\ndef read_json(path):\n    " * 12
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Baton:
    """Runs commands, in a directory of their own."""

    folder: Path

    def start(self, *arguments: str, output: Path) -> subprocess.Popen[bytes]:
        # Whoever runs the tests in the background of a shell ignores interrupts, and so would the child.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with output.open("wb") as file:
                return subprocess.Popen(
                    self._command(arguments), cwd=self.folder, env=self._environment(), stdout=file, stderr=subprocess.STDOUT
                )
        finally:
            signal.signal(signal.SIGINT, before)

    def run(self, *arguments: str, timeout_s: float = START_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command(arguments),
            cwd=self.folder,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def processes(self) -> dict[int, str]:
        """Command lines by pid of all that run here, zombies apart."""
        found = {}
        for directory in Path("/proc").iterdir():
            try:
                if directory.name.isdigit() and (directory / "cwd").readlink() == self.folder:
                    found[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue  # it has ended, or is not ours
        return found

    def pid_of(self, words: str) -> int:
        [pid] = [pid for pid, command in self.processes().items() if words in command]
        return pid

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "services.cli", *arguments]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


@dataclass(frozen=True)
class Mesh:
    baton: Baton
    process: subprocess.Popen[bytes]
    output: Path
    router: str

    def text(self) -> str:
        return self.output.read_text()

    def generate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        options = ("--router", self.router, "--max-tokens", "16", "--temperature", "0", "--ignore-eos")
        return self.baton.run("generate", *options, *arguments)

    def completion(self, *arguments: str) -> str:
        """The text of a request that succeeds."""
        result = self.generate(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def wait_for(self, words: str, *, times: int = 1) -> None:
        wait_for(lambda: len(re.findall(words, self.text())) >= times, self.text)


def wait_for(condition: Callable[[], bool], explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


@pytest.fixture
def baton(tmp_path: Path) -> Iterator[Baton]:
    """For one test; nothing of it survives, even if the test fails."""
    runner = Baton(tmp_path.resolve())
    yield runner
    for pid in runner.processes():
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One prefill worker, one decode worker; prompts go by way of the prefill worker. Stopped by Ctrl-C, after which nothing is left."""
    folder = tmp_path_factory.mktemp("mesh").resolve()
    runner, output = Baton(folder), folder / "output"
    ports = ("--port", "0", "--http-port", "0")
    options = ("--prefill", "1", "--decode", "1", *ports, "--log-dir", str(folder / "logs"), "--set", "router.max_local_tokens=0")
    process = runner.start("up", *options, output=output)
    try:
        wait_for(lambda: process.poll() is not None or "Ctrl-C" in output.read_text(), output.read_text)
        assert process.poll() is None, output.read_text()
        [router] = re.findall(r"is served at (\S+)", output.read_text())
        yield Mesh(runner, process, output, router)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, output.read_text()
        assert output.read_text().endswith("everything has stopped\n")
        assert runner.processes() == {}
    finally:
        for pid in runner.processes():
            os.kill(pid, signal.SIGKILL)
        process.wait(timeout=10)


def test_up_when_ready_has_told_of_each_process_and_how_to_use_it(mesh: Mesh) -> None:
    text = mesh.text()
    for name in ("redis", "kv_index", "prefill-0", "decode-0", "router-0"):
        assert re.search(rf"^\S+  {name} +starting$", text, re.MULTILINE)
        assert re.search(rf"^\S+  {name} +serving after \d+\.\d s$", text, re.MULTILINE)
    for name in ("prefill-0", "decode-0"):
        assert re.search(rf"^\S+  {name} +up at router-0$", text, re.MULTILINE)
    assert f"baton generate --router {mesh.router} " in text
    assert "baton top --router" in text
    [curl] = re.findall(r"^  (curl .*)$", text, re.MULTILINE)
    url, data = shlex.split(curl)[1], shlex.split(curl)[-1]
    assert url.removesuffix("/completions") in text.split("(OpenAI's API)")[0]
    request = urllib.request.Request(url, data.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["choices"][0]["text"]
    # A Ctrl-C in the terminal reaches the supervisor's group alone.
    supervisor_group = os.getpgid(mesh.process.pid)
    assert all(os.getpgid(pid) != supervisor_group for pid in mesh.baton.processes() if pid != mesh.process.pid)


def test_generate_when_asked_twice_gives_the_same_text_and_finds_its_prefix(mesh: Mesh) -> None:
    prompt = f"# {uuid.uuid4().hex}\n{PROMPT}"
    first, second = mesh.generate(prompt, "--timing"), mesh.generate(prompt)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout and len(first.stdout) > 16
    assert re.search(r"16 new in .*, 0 of \d+ prompt tokens cached, prefill-0 → decode-0, \d+ KV blocks over shm, seed \d+", first.stderr)
    assert re.search(r"^KV moved +\S+ .s │.*│ \d+ blocks, \S+ .B, shm, \S+ .B/s$", first.stderr, re.MULTILINE)
    cached = re.search(r", (\d+) of (\d+) prompt tokens cached", second.stderr)
    assert cached is not None and 0 < int(cached[2]) - int(cached[1]) <= 16, "all but the last block were there"


def test_generate_when_a_stop_string_comes_leaves_it_out(mesh: Mesh) -> None:
    whole = mesh.completion(PROMPT)
    stop = whole[5:8]
    assert mesh.completion(PROMPT, "--stop", stop) == whole[: whole.index(stop)] + "\n"


def test_generate_when_the_mesh_refuses_exits_with_2_and_one_line(mesh: Mesh) -> None:
    for arguments, field in ((("--top-p", "2"), "top_p"), (("--max-tokens", "99999"), "max_tokens"), (("--stop", ""), "stop")):
        result = mesh.generate("x", *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: {field}: ") and result.stderr.count("\n") == 1


def test_top_when_once_shows_workers_and_counters(mesh: Mesh) -> None:
    assert mesh.completion(PROMPT)
    result = mesh.baton.run("top", "--once", "--router", mesh.router)
    assert result.returncode == 0, result.stderr
    assert "router-0 at " in result.stdout and " · demo · " in result.stdout
    finished = re.search(r"finished (\d+)", result.stdout)
    assert finished is not None and int(finished[1]) >= 1
    for name in ("prefill-0", "decode-0"):
        assert re.search(rf"^{name} +up +0/0 ", result.stdout, re.MULTILINE), result.stdout


@pytest.mark.parametrize("victim", ["decode", "redis"])
def test_up_when_a_process_is_killed_starts_it_again_and_serves_as_before(mesh: Mesh, victim: str) -> None:
    before = mesh.completion(PROMPT)
    name = {"decode": "decode-0", "redis": "redis"}[victim]
    serving = len(re.findall(rf"{name} +serving after", mesh.text()))
    words = {"decode": "-m services.decode", "redis": "-server 127.0.0.1:"}[victim]
    pid = mesh.baton.pid_of(words)
    os.kill(pid, signal.SIGKILL)
    if victim == "redis":
        # Redis is optional while a mesh runs.
        assert mesh.completion(PROMPT) == before
    mesh.wait_for(rf"{name} +serving after", times=serving + 1)
    assert re.search(rf"{name} +killed by SIGKILL; starts again in 0\.1 s", mesh.text())
    assert mesh.baton.pid_of(words) != pid
    after = mesh.generate(PROMPT)
    deadline = time.monotonic() + START_TIMEOUT_S
    while after.returncode != 0:  # until the router has met the new one
        assert time.monotonic() < deadline, after.stderr
        after = mesh.generate(PROMPT)
    assert after.stdout == before


def test_router_when_killed_ends_its_requests_with_when_to_try_again_and_its_successor_serves_at_once(mesh: Mesh) -> None:
    before = mesh.completion(PROMPT)
    serving = len(re.findall(r"router-0 +serving after", mesh.text()))
    long = ("--temperature", "0", "--ignore-eos", "--max-tokens", "3000")
    program = block("python", "Generate(").replace(ADDRESS, mesh.router).replace("max_tokens=32", "max_tokens=3000, ignore_eos=True")
    outputs = [mesh.baton.folder / name for name in ("generate", "program")]
    clients = [mesh.baton.start("generate", "--router", mesh.router, PROMPT, *long, output=outputs[0])]
    with outputs[1].open("wb") as file:
        clients.append(subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT))
    try:
        wait_for(lambda: all(output.stat().st_size > 20 for output in outputs), mesh.text)
        os.kill(mesh.baton.pid_of("-m services.router"), signal.SIGKILL)
        statuses = [client.wait(timeout=START_TIMEOUT_S) for client in clients]
    finally:
        for client in clients:
            client.kill()
    said, told = (output.read_text() for output in outputs)
    assert statuses == [1, 0]
    assert re.search(r"^error: \S+: unavailable: .*; try again in 1 s$", said, re.MULTILINE), said
    assert re.search(r"UNAVAILABLE the router: unavailable: .* 1\.0$", told.rstrip()), told
    mesh.wait_for(r"router-0 +serving after", times=serving + 1)
    assert mesh.completion(PROMPT) == before


def test_up_when_a_worker_cannot_start_shows_its_last_words_and_leaves_nothing(baton: Baton) -> None:
    result = baton.run("up", "--prefill", "0", "--decode", "1", "--port", "0", "--http-port", "0", "--max-model-len", "5000")
    assert result.returncode == 1
    assert "error: decode-0 exited with status " in result.stderr
    assert "5000 is more than the checkpoint's 4096" in result.stderr
    assert baton.processes() == {}


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--model", "./nowhere"), 1, "error: ./nowhere: no such checkpoint directory"),
        (("--model", "."), 1, "config.json: no such file"),
        (("--dtype", "int8"), 2, "'int8' is not one of auto, float32, bfloat16, float16"),
        (("--decode", "0"), 2, "error: --decode: 0 is outside [1, 64]"),
        (("--set", "colour=red"), 2, "error: --set colour=red: no such setting of any process"),
        (("--log-dir", sys.executable), 2, f"error: --log-dir: {sys.executable}: File exists"),
    ],
)
def test_up_when_what_it_is_told_is_wrong_starts_nothing(baton: Baton, options: tuple[str, ...], status: int, words: str) -> None:
    result = baton.run("up", "--port", "0", "--http-port", "0", *options)
    assert (result.returncode, result.stdout) == (status, "")
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_demo_when_run_shows_four_timelines_moves_blocks_and_leaves_nothing(baton: Baton) -> None:
    result = baton.run("demo", timeout_s=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert baton.processes() == {}
    assert len(re.findall(r"^first token ", result.stdout, re.MULTILINE)) == 4
    totals = re.search(r"(\d+) KV blocks \(.*\) moved over \w+; ([\d,]+) of ([\d,]+) prompt tokens", result.stdout)
    assert totals is not None, result.stdout
    moved, cached, prompt = (int(number.replace(",", "")) for number in totals.groups())
    assert moved >= 27, "the first prompt's blocks"
    assert cached >= prompt / 2, "the other prompts' prefix"
    [logs] = re.findall(r"logs: (\S+)", result.stdout) or [None]
    assert logs is None, "nothing is left on disk either"
    assert re.search(r"^  curl http://\S+/v1/completions ", result.stdout, re.MULTILINE)
    assert '"object":"text_completion"' in result.stdout


def test_profile_when_made_of_real_processes_is_read_by_the_simulator(baton: Baton) -> None:
    result = baton.run("bench", "profile", "--rounds", "1", "-o", "worker.json", timeout_s=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert baton.processes() == {}
    profile = json.loads((baton.folder / "worker.json").read_text())
    # Calls take time, and a worker's steps at least their engine's, give or take what a busy machine does to either.
    assert 0.0 < profile["overhead_s"] < 1.0 and 0.0 < profile["remote_overhead_s"] < 1.0
    assert profile["decode"]["seconds"][0] + profile["decode"]["seconds"][1] > 0.0
    simulated = subprocess.run(
        [
            sys.executable,
            "-m",
            "loadtest",
            "sim",
            "generated",
            "--scale",
            "32",
            "--requests",
            "50",
            "--worker-model",
            "worker.json",
            "--json",
        ],
        cwd=baton.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert simulated.returncode == 0, simulated.stderr
    assert json.loads(simulated.stdout)["requests"]["completed"] == 50
