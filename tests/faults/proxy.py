"""A TCP proxy in front of one port, so that a test can cut the connections to it or make the link slow. Knows nothing of what passes."""

import asyncio
import contextlib
import socket
import struct
from typing import Self

from services.cli.ports import HOST

# Processes listen on 127.0.0.1; everybody calls them at the same port of this address, which Linux has without being told.
PROXY_HOST = "127.0.0.2"
_CHUNK_BYTES = 1 << 16
_SLOW_CHUNK_BYTES = 1 << 12
_SLOW_DELAY_S = 0.02  # of each chunk, one way: 200 KB/s


class Proxy:
    """`async with Proxy(port)`: passes what comes to PROXY_HOST:port on to 127.0.0.1:port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._passing: set[asyncio.Task[None]] = set()
        self.is_slow = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, PROXY_HOST, self._port, limit=_CHUNK_BYTES)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        self.reset()
        if self._passing:
            await asyncio.wait(self._passing)

    def reset(self) -> None:
        """Ends all connections with RST, both ways."""
        for writer in self._writers:
            sock: socket.socket = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)
        try:
            there_reader, there_writer = await asyncio.open_connection(HOST, self._port, limit=_CHUNK_BYTES)
        except OSError:
            writer.transport.abort()
            return
        both = (writer, there_writer)
        self._writers.update(both)
        ways = [asyncio.ensure_future(self._pass_on(reader, there_writer)), asyncio.ensure_future(self._pass_on(there_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for end in both:
                end.close()
            await asyncio.wait(ways)
            for end in both:
                with contextlib.suppress(OSError):
                    await end.wait_closed()
            self._writers.difference_update(both)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_SLOW_CHUNK_BYTES if self.is_slow else _CHUNK_BYTES):
                if self.is_slow:
                    await asyncio.sleep(_SLOW_DELAY_S)
                writer.write(data)
                await writer.drain()
