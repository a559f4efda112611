"""Where a checkpoint is found: here, or on a hub, of which a small one runs in the test."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from services.core.errors import CheckpointError
from services.tokenizer.checkpoint_dir import WANTED, resolve_checkpoint

ROOT = Path(__file__).parents[3]
DEMO = Path("/where/the/demo/is")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_resolve_when_the_demo_is_asked_for_returns_it_unread() -> None:
    assert resolve_checkpoint("demo", demo=DEMO) == DEMO


def test_resolve_when_a_directory_exists_returns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_checkpoint(str(tmp_path / "owner"), demo=DEMO) == tmp_path / "owner"
    assert resolve_checkpoint("owner/name", demo=DEMO) == Path("owner/name")  # before the hub is thought of
    assert resolve_checkpoint("~/owner", demo=DEMO) == tmp_path / "owner"


@pytest.mark.parametrize(
    "model", ["/no/such/directory", "./no", "../no", "~/no/such", "~nobody-of-that-name/x", "one-word", "a/b/c", "models/demo/target/"]
)
def test_resolve_when_a_path_is_no_directory_raises_checkpoint_error_without_asking_the_hub(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory") as error:
        resolve_checkpoint(model, demo=DEMO)
    assert error.value.path == model


def test_resolve_when_a_file_has_the_name_raises_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        resolve_checkpoint(str(tmp_path / "model.safetensors"), demo=DEMO)


# --- the hub ---


class Hub(ThreadingHTTPServer):
    """Serves repositories as huggingface.co does: a model's commit, its tree, its files. A `portal` answers everything with a page."""

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]], *, portal: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories = repositories
        self.portal = portal
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.portal:
            self._answer(b"<html>Welcome to the airport</html>")
            return
        for name, files in self.server.repositories.items():
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                self._answer(json.dumps({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}).encode())
                return
            if path == f"/api/models/{name}/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for file, data in files.items()
                ]
                self._answer(json.dumps(tree).encode())
                return
            file = path.removeprefix(f"/{name}/resolve/{COMMIT}/")
            if file in files:
                if self.command == "GET":
                    self.server.downloads.append(file)
                self._answer(files[file], file=True)
                return
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, data: bytes, *, file: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        if file:
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    files = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer.model": b"sentencepiece",
        "chat_template.jinja": b"{{ messages }}",
        "model-00001-of-00002.safetensors": b"weights" * 1000,
        "model.safetensors.index.json": b"{}",
        "pytorch_model.bin": b"pickle",
        "README.md": b"# readme",
        "model.gguf": b"gguf",
    }
    with Hub({"owner/name": files}, portal=getattr(request, "param", False)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def resolve_elsewhere(model: str, endpoint: str, cache: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """resolve_checkpoint in a process of its own, for the hub's library reads its settings when it is imported."""
    program = (
        "import sys; from pathlib import Path; from services.core.errors import CheckpointError\n"
        "from services.tokenizer.checkpoint_dir import resolve_checkpoint\n"
        "try: print(resolve_checkpoint(sys.argv[1], demo=Path('demo')))\n"
        "except CheckpointError as error: sys.exit(f'CheckpointError {error}')"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and not name.lower().endswith("_proxy")}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", program, model], cwd=ROOT, env=kept | own | environ, capture_output=True, text=True, timeout=60
    )


def test_resolve_when_the_hub_has_the_model_downloads_what_is_wanted_once(hub: Hub, tmp_path: Path) -> None:
    first = resolve_elsewhere("owner/name", hub.url, tmp_path)
    assert first.returncode == 0, first.stderr
    directory = Path(first.stdout.strip())
    wanted = {
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert {path.name for path in directory.iterdir()} == wanted
    assert (directory / "model-00001-of-00002.safetensors").read_bytes() == b"weights" * 1000
    assert sorted(hub.downloads) == sorted(wanted)
    # Again, and then without a network: from the cache.
    again = resolve_elsewhere("owner/name", hub.url, tmp_path)
    offline = resolve_elsewhere("owner/name", hub.url, tmp_path, HF_HUB_OFFLINE="1")
    assert again.stdout == offline.stdout == first.stdout
    assert len(hub.downloads) == len(wanted)


def test_resolve_when_the_hub_has_no_such_model_raises_checkpoint_error_in_one_line(hub: Hub, tmp_path: Path) -> None:
    result = resolve_elsewhere("owner/unknown", hub.url, tmp_path)
    assert result.stderr.strip().startswith("CheckpointError owner/unknown: no such directory, and the hub does not give it: ")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("model", ["owner/na me", "-owner/--name", f"owner/{'x' * 200}"])
def test_resolve_when_a_name_cannot_be_a_repository_raises_checkpoint_error(model: str, hub: Hub, tmp_path: Path) -> None:
    result = resolve_elsewhere(model, hub.url, tmp_path)
    assert "CheckpointError " in result.stderr and "Traceback" not in result.stderr


def test_resolve_when_there_is_no_network_raises_checkpoint_error(tmp_path: Path) -> None:
    for environ in ({"HF_HUB_OFFLINE": "1"}, {}):
        result = resolve_elsewhere("owner/name", "http://127.0.0.1:9", tmp_path, **environ)
        assert result.stderr.strip().splitlines()[-1].startswith("CheckpointError owner/name: ")
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("hub", [True], indirect=True)
def test_resolve_when_another_than_the_hub_answers_raises_checkpoint_error(hub: Hub, tmp_path: Path) -> None:
    result = resolve_elsewhere("owner/name", hub.url, tmp_path)
    assert result.stderr.strip().splitlines()[-1].startswith("CheckpointError owner/name: ")
    assert "Traceback" not in result.stderr


def test_wanted_when_compared_with_what_is_read_has_it() -> None:
    read = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert all(any(Path(name).match(pattern) for pattern in WANTED) for name in (*read, "chat_template.jinja", "model.safetensors"))
