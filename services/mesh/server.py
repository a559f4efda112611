"""The frame of a process: settings, logs, event loop, a gRPC server with health and reflection, errors as statuses, drain, stop.

    start ─▶ serving ── SIGTERM or SIGINT ─▶ draining: health says NOT_SERVING, accepted work finishes ─▶ stopped
                                               a second signal, or drain_timeout_s, ends the wait

Knows nothing of what is served. Handlers raise errors of the tree (core/errors); the interceptor here makes them statuses.
"""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import logging
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
import uvloop
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.core.errors import ConfigurationError, InvalidRequest
from services.mesh import failpoints, logs, status
from services.mesh.client import MAX_MESSAGE_BYTES, is_address
from services.mesh.config import load_settings, printable

REQUEST_ID_METADATA = "x-request-id"
_REQUEST_ID = re.compile(r"[ -~]{1,128}")
# How long a stopping server waits for the `finally` of handlers that it has cancelled.
CLEANUP_S = 5.0

_log = logging.getLogger(__name__)
_Boundary = Callable[[Any], contextlib.AbstractAsyncContextManager[None]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSettings:
    """What every process has.

    listen            host:port of the gRPC server; port 0 takes a free one
    log_format        json, or text for people
    drain_timeout_s   how long accepted work may take after SIGTERM
    failpoints        folder in which tests make this process fail, see failpoints.py; None: nothing can
    """

    listen: str = "127.0.0.1:0"
    log_format: str = "json"
    log_level: str = "INFO"
    drain_timeout_s: float = 30.0
    failpoints: Path | None = None

    def validate(self) -> None:
        """Raises InvalidRequest naming the first setting that is out of its limits."""
        if self.log_format not in ("json", "text"):
            raise InvalidRequest("log_format", f"{self.log_format!r} is not one of json, text")
        if self.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise InvalidRequest("log_level", f"{self.log_level!r} is not one of DEBUG, INFO, WARNING, ERROR")
        if self.drain_timeout_s < 0:
            raise InvalidRequest("drain_timeout_s", f"{self.drain_timeout_s} is negative", limit=0)
        check_address("listen", self.listen)


def check_address(field: str, address: str) -> None:
    """Raises InvalidRequest unless it is host:port."""
    if not is_address(address, lowest_port=0):
        raise InvalidRequest(field, f"{address!r} is not host:port")


_Settings = TypeVar("_Settings", bound=ProcessSettings)


def run_process(service: str, kind: type[_Settings], serve: Callable[[_Settings, asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Runs `serve(settings, stop)` until it returns; `stop` is set by the first SIGTERM or SIGINT.

    Exits with 2 when settings are wrong, with 1 when `serve` raises (the log says what) or on a second signal.
    """
    try:
        settings = load_settings(kind, os.environ)
        failpoints.enable(settings.failpoints)
    except ConfigurationError as error:
        _refuse_settings(service, error)
    logs.configure_logging(service, as_json=settings.log_format == "json", level=settings.log_level)
    _log.info("starting", extra={"settings": printable(settings)})

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if stop.is_set():
                _log.warning("second signal: stopping without waiting for accepted work")
                os._exit(1)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await serve(settings, stop)

    try:
        uvloop.run(main())
    except ConfigurationError as error:  # what only shows when it is put to use
        _refuse_settings(service, error)
    except Exception:
        _log.critical("ended by an error", exc_info=True)
        sys.exit(1)
    _log.info("stopped")
    # All is closed. Taking torch and the interpreter apart would cost another second, in which a restart has to wait for the port.
    logging.shutdown()
    os._exit(0)


def _refuse_settings(service: str, error: ConfigurationError) -> NoReturn:
    print(f"{service}: {len(error.problems)} problem(s) in the settings\n  " + "\n  ".join(error.problems), file=sys.stderr)
    sys.exit(2)


class MeshServer:
    """A grpc.aio server in the frame above. `async with` starts and stops it; `address` has the port that was really taken."""

    def __init__(
        self,
        listen: str,
        register: Callable[[grpc.aio.Server], None],
        *,
        services: Sequence[str],
        drain_timeout_s: float = 30.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        handshake_timeout_s: float = 10.0,
        returns_request_id: bool = True,
    ) -> None:
        """`register` adds the servicers; `services` are their full names, for health and reflection.

        `returns_request_id`: each answer begins with it. Callers that have given it save the time that takes.

        Raises OSError when the address cannot be taken.
        """
        self._drain_timeout_s = drain_timeout_s
        self._services = services
        self._interceptor = ErrorInterceptor(returns_request_id=returns_request_id)
        self._server = grpc.aio.server(
            interceptors=[self._interceptor],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # Who connects and does not speak HTTP/2 by then is hung up on; the library's own patience is two minutes.
                ("grpc.server_handshake_timeout_ms", round(handshake_timeout_s * 1000)),
            ],
        )
        register(self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        host = listen.rpartition(":")[0]
        try:
            self.address = f"{host}:{self._server.add_insecure_port(listen)}"
        except RuntimeError as error:
            raise OSError(f"cannot listen on {listen}") from error

    async def __aenter__(self) -> "MeshServer":
        await self.set_serving(False)  # the library's health would begin with SERVING
        await self._server.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        # A grace of zero cancels what is still open: whoever wanted it to finish has called drain().
        await self._server.stop(0)
        # The library has cancelled the handlers but does not wait for them, and what they clean up in may be closed next.
        if self._interceptor.calls:
            _, late = await asyncio.wait(self._interceptor.calls, timeout=CLEANUP_S)
            if late:
                _log.error("%d call(s) did not end within %s s of being cancelled", len(late), CLEANUP_S)

    async def set_serving(self, serving: bool) -> None:
        """What health answers, for the server as a whole and each of its services."""
        word = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, word)

    async def drain(self, wait_idle: Callable[[], Awaitable[object]]) -> None:
        """Says NOT_SERVING, then waits until the accepted work is done or drain_timeout_s has passed."""
        await self.set_serving(False)
        _log.info("draining")
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await wait_idle()
        except TimeoutError:
            _log.warning("accepted work did not finish within %s s", self._drain_timeout_s)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Names the request for logs and errors, and turns what a handler raises into the status of status.py's table.

    calls   tasks of the calls whose handlers have not ended
    """

    def __init__(self, *, returns_request_id: bool) -> None:
        self.calls: set[asyncio.Task[Any]] = set()
        self._boundary = functools.partial(_boundary, returns_request_id=returns_request_id)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = ("stream" if handler.request_streaming else "unary") + ("_stream" if handler.response_streaming else "_unary")
        call = asyncio.current_task()
        assert call is not None
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)
        decode = _decoder(handler.request_deserializer)
        behavior = getattr(handler, kind)
        answer = (_answer_stream if handler.response_streaming else _answer_once)(
            # A single request is decoded within the boundary: outside of it, the library tells the caller what its parser raised.
            behavior if handler.request_streaming else lambda data, context: behavior(decode(data), context),
            self._boundary,
        )
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            answer, request_deserializer=decode if handler.request_streaming else None, response_serializer=handler.response_serializer
        )


def _decoder(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            raise InvalidRequest("request", "is not a message of the kind that this call takes") from None

    return decode


def _answer_once(behavior: Callable[[Any, Any], Awaitable[Any]], boundary: _Boundary) -> Callable[[Any, Any], Awaitable[Any]]:
    async def answer(request: Any, context: Any) -> Any:
        async with boundary(context):
            return await behavior(request, context)

    return answer


def _answer_stream(behavior: Callable[[Any, Any], Any], boundary: _Boundary) -> Callable[[Any, Any], Awaitable[None]]:
    # Writes by itself instead of being iterated: a cancel then arrives here, and the handler's `finally` runs at once in its own task.
    async def answer(request: Any, context: Any) -> None:
        async with boundary(context):
            responses = behavior(request, context)
            if inspect.iscoroutine(responses):
                await responses  # the library's health.Watch writes by itself, too
                return
            async with contextlib.aclosing(responses):
                async for response in responses:
                    try:
                        await _write(context, response)
                    except BaseException as error:
                        # The handler's `yield` failed, and must be told so: a task group or timeout around it cancels this task, too.
                        with contextlib.suppress(StopAsyncIteration):
                            await responses.athrow(error)
                        raise

    return answer


async def _write(context: Any, response: Any) -> None:
    try:
        await context.write(response)
    except grpc.aio.InternalError:
        # The caller has gone, and this task's cancel is on its way. It must come here: later, it would hit the handler's `finally`.
        await asyncio.sleep(1)
        raise asyncio.CancelledError from None


@contextlib.asynccontextmanager
async def _boundary(context: Any, *, returns_request_id: bool) -> AsyncIterator[None]:
    request_id = accept_request_id(context.invocation_metadata())
    logs.request_id.set(request_id)
    try:
        if returns_request_id:
            await context.send_initial_metadata(((REQUEST_ID_METADATA, request_id),))
        yield
    except grpc.aio.AbortError:
        raise  # health and reflection abort by themselves
    except (Exception, BaseExceptionGroup) as error:
        await context.abort_with_status(status.to_status(only_one(error), logs.request_id.get()))


def only_one(error: BaseException) -> BaseException:
    """A task group's error, unwrapped when it holds just one, not counting that a generator was closed around it."""
    while isinstance(error, BaseExceptionGroup):
        errors = [inner for inner in error.exceptions if not isinstance(inner, GeneratorExit)]
        if len(errors) != 1:
            break
        error = errors[0]
    return error


def accept_request_id(metadata: Sequence[tuple[str, str | bytes]] | None) -> str:
    """The caller's x-request-id if it is short and printable ASCII, else a new one."""
    for name, value in metadata or ():
        if name == REQUEST_ID_METADATA and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return os.urandom(8).hex()
