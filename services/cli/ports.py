"""Ports on 127.0.0.1 that stay reserved for as long as somebody holds them, whether a process listens on them just now or not.

A port is held by a socket that is bound to it and never listens: the kernel gives it to nobody who wants any free port, but whoever asks
for it by number with SO_REUSEADDR, as servers do, may listen on it. So an address survives the restart of its process.
"""

import random
import socket
from pathlib import Path

from services.core.errors import InvalidRequest

HOST = "127.0.0.1"
_LOWEST = 20_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


class ReservedPorts:
    """`with ReservedPorts() as ports`: what was taken is free again at the end."""

    def __init__(self) -> None:
        self._holders: list[socket.socket] = []
        # Below the ports from which outgoing connections take theirs: those may hold one for a while before we come to ask.
        self._highest = _lowest_ephemeral() - 1

    def __enter__(self) -> "ReservedPorts":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for holder in self._holders:
            holder.close()

    def take(self, port: int = 0, *, option: str = "--port") -> int:
        """This port, or any. Raises InvalidRequest naming the option when it is in use or is none."""
        if port:
            if not 0 < port < 65536:
                raise InvalidRequest(option, f"{port} is outside [1, 65535]", limit=65535)
            # With reuse from the start: connections of a mesh that stopped a moment ago linger on the port for a minute.
            if not self._hold(port, exclusively=False):
                raise InvalidRequest(option, f"{port} is in use")
            return port
        while True:
            port = random.randint(_LOWEST, self._highest)
            # Without reuse while binding, so that another one's reservation is noticed too.
            if self._hold(port, exclusively=True):
                return port

    def _hold(self, port: int, *, exclusively: bool) -> bool:
        holder = socket.socket()
        try:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, not exclusively)
            holder.bind((HOST, port))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        except OSError:
            holder.close()
            return False
        self._holders.append(holder)
        return True


def _lowest_ephemeral() -> int:
    try:
        lowest = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768  # Linux' own default
    return lowest if lowest > _LOWEST + 1000 else 65_536
