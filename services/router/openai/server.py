"""uvicorn's protocol in the event loop of its host, without signal handlers or processes of its own: started, served, stopped."""

import asyncio
import logging
import time
from email.utils import formatdate
from typing import Any

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from services.mesh.server import CLEANUP_S
from services.router.openai.protocol import BoundedProtocol, Limits

# Answers that are made may be written to their end after the drain.
LAST_WRITES_S = 1.0

_log = logging.getLogger(__name__)


class HttpServer:
    """`async with` starts and stops it; `address` then has the port that was really taken."""

    def __init__(self, app: ASGIApp, listen: str, *, limits: Limits | None = None) -> None:
        self._listen = listen
        self._limits = limits or Limits()
        self._state = ServerState()
        self._config = Config(
            app,
            ws="none",
            lifespan="off",
            interface="asgi3",
            access_log=False,
            log_config=None,
            log_level="critical",  # what strangers send is not worth a line each; what goes wrong here, the app logs
            timeout_keep_alive=self._limits.keep_alive_s,
        )
        self.address = listen

    async def __aenter__(self) -> "HttpServer":
        """Raises OSError when the address cannot be taken."""
        loop = asyncio.get_running_loop()
        host, _, port = self._listen.rpartition(":")
        self._config.load()
        try:
            self._server = await loop.create_server(
                lambda: BoundedProtocol(self._config, self._state, self._limits, loop), host.strip("[]"), int(port), backlog=2048
            )
        except OSError as error:
            raise OSError(f"cannot listen on {self._listen} for HTTP: {error.strerror}") from error
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"
        self._date = loop.create_task(self._keep_date())
        _log.info("serving HTTP", extra={"address": self.address})
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Whoever wanted accepted work to finish has waited for it: what is left gets a second, and is cut off."""
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        tasks = set(self._state.tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WRITES_S)
        for connection in list(self._state.connections):
            connection.transport.abort()  # which cancels its task
        late = {task for task in tasks if not task.done()}
        if late:
            _, late = await asyncio.wait(late, timeout=CLEANUP_S)
        if late:
            _log.error("%d HTTP request(s) did not end within %s s of being cut off", len(late), CLEANUP_S)
        self._date.cancel()

    @property
    def num_connections(self) -> int:
        return len(self._state.connections)

    def sockets(self) -> list[Any]:
        """Of the open connections."""
        return [connection.transport.get_extra_info("socket") for connection in self._state.connections]

    async def _keep_date(self) -> None:
        while True:
            self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
            await asyncio.sleep(1)
