"""Connections that do not behave, on real sockets: slow, silent, gone, deaf, too many. And the server's start and stop."""

import asyncio
import socket
from collections.abc import AsyncGenerator

import pytest

from services.core.types import FinishReason
from services.router.openai.pieces import MAX_WAITING, Piece
from services.router.openai.protocol import MAX_HEAD_BYTES, Limits
from services.router.openai.server import HttpServer
from services.router.request import Delta, GenerationRequest
from tests.unit.router.openai.scripted_face import WORD, Face, read_reply, request_bytes, run, scripted_face, summary
from tests.waiting import wait_until

COMPLETIONS = "/v1/completions"


async def forever(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
    """One token, then nothing, until it is closed."""
    yield Delta(0, " =", WORD[:1], (), None)
    await asyncio.Event().wait()
    yield summary(request, 1)


async def torrent(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
    """Tokens without an end, as fast as they are taken."""
    while True:
        await asyncio.sleep(0)
        yield Delta(0, "x" * 1000, WORD[:1], (), None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("size", [1, 50_000])
def test_client_when_it_leaves_ends_its_request(stream: bool, size: int) -> None:
    """Also after a body long enough for the server to have paused reading."""

    async def test(face: Face) -> None:
        _, writer = await face.connect()
        prompt = ", ".join(["5"] * size)
        writer.write(request_bytes(COMPLETIONS, f'{{"prompt": [{prompt}], "stream": {str(stream).lower()}}}'.encode()))
        await wait_until(lambda: face.seen)
        writer.close()
        assert await wait_until(lambda: face.ended) < 1.0

    run(test, forever)


@pytest.mark.parametrize("num_choices", [1, 2])
def test_client_when_it_does_not_read_waits_for_itself_alone_and_is_cut_off(num_choices: int) -> None:
    taken = 0

    async def script(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        nonlocal taken
        if request.cache_salt:
            yield Delta(0, " =", WORD[:1], (), FinishReason.STOP)
            yield summary(request, 1)
            return
        async for piece in torrent(request):
            taken += 1
            yield piece

    async def test(face: Face) -> None:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        host, _, port = face.address.rpartition(":")
        await asyncio.get_running_loop().sock_connect(raw, (host, int(port)))
        await asyncio.get_running_loop().sock_sendall(
            raw, request_bytes(COMPLETIONS, b'{"prompt": [5], "stream": true, "n": %d}' % num_choices)
        )
        await wait_until(lambda: face.seen)
        await asyncio.sleep(0.3)
        before = taken
        assert (await face.post(COMPLETIONS, {"prompt": [5], "cache_salt": "other"})).status == 200
        await asyncio.sleep(0.1)
        # What the sockets hold, and what may wait: no more is taken from the worker.
        assert taken == before < 20_000 + MAX_WAITING
        assert await wait_until(lambda: len(face.ended) == 2) < 5.0
        raw.close()

    run(test, script, limits=Limits(write_timeout_s=1.0))


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: ",
        request_bytes(COMPLETIONS, b'{"prompt": ', num_bytes=100),
    ],
)
def test_request_when_it_does_not_become_whole_is_closed(sent: bytes) -> None:
    async def test(face: Face) -> None:
        reply = await face.send(sent)
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert reply.json["error"]["message"]
        assert not face.seen

    run(test, limits=Limits(request_timeout_s=0.2))


def test_request_when_it_drips_is_closed_all_the_same() -> None:
    async def test(face: Face) -> None:
        reader, writer = await face.connect()
        reply = asyncio.create_task(reader.read())
        for byte in b"GET /health HTTP/1.1\r\nx-slow: " + b"a" * 100:
            if reply.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
        assert read_reply(await reply).status == 408
        writer.close()

    run(test, limits=Limits(request_timeout_s=0.2))


def test_connection_when_kept_alive_serves_again_and_is_closed_when_idle() -> None:
    async def test(face: Face) -> None:
        reader, writer = await face.connect()
        for _ in range(3):
            writer.write(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200" in (await reader.readuntil(b"\r\n\r\n"))
            assert await reader.readexactly(19)
            await asyncio.sleep(0.3)  # longer than a request may take: that clock stands between requests
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()

    run(test, limits=Limits(request_timeout_s=0.2, keep_alive_s=1))


def test_head_when_it_is_too_long_is_refused() -> None:
    async def test(face: Face) -> None:
        reply = await face.send(b"GET /health HTTP/1.1\r\nx-long: " + b"a" * (MAX_HEAD_BYTES + 1))
        assert reply.status == 431

    run(test)


def test_bytes_when_they_are_not_http_are_refused_in_openais_shape() -> None:
    async def test(face: Face) -> None:
        reply = await face.send(b"\x16\x03\x01\x02 hello\r\n\r\n")
        assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request_error")

    run(test)


def test_connections_when_there_are_too_many_are_told_to_come_back() -> None:
    async def test(face: Face) -> None:
        held = [await face.connect() for _ in range(2)]
        reply = await face.get("/health")
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        held += [await face.connect() for _ in range(2)]
        reader, writer = await face.connect()
        assert await reader.read() == b"", "more than twice as many get no word"
        for _, each in [*held, (reader, writer)]:
            each.close()
        await wait_until(lambda: not face.server.num_connections)
        assert (await face.get("/health")).status == 200

    run(test, limits=Limits(max_connections=2))


def test_sockets_when_connected_send_without_delay() -> None:
    """With Nagle's algorithm the second write of a small answer waits for the peer's delayed acknowledgement: 40 ms."""

    async def test(face: Face) -> None:
        _, writer = await face.connect()
        await wait_until(lambda: face.server.num_connections)
        for sock in face.server.sockets():
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        writer.close()

    run(test)


def test_server_when_stopped_lets_answers_be_written_and_cuts_off_the_rest() -> None:
    async def slow(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        if request.cache_salt:
            await asyncio.Event().wait()
        await asyncio.sleep(0.2)
        yield Delta(0, " =", WORD[:1], (), FinishReason.STOP)
        yield summary(request, 1)

    async def main() -> None:
        async with scripted_face(slow) as face:
            finishing = asyncio.create_task(face.post(COMPLETIONS, {"prompt": [5]}))
            hanging = asyncio.create_task(face.post(COMPLETIONS, {"prompt": [5], "cache_salt": "s"}))
            await wait_until(lambda: len(face.seen) == 2)
        assert len(face.ended) == 2
        assert (await finishing).status == 200
        with pytest.raises((ConnectionError, IndexError)):
            await hanging

    asyncio.run(main())


def test_server_when_its_port_is_taken_says_which() -> None:
    async def main() -> None:
        async with scripted_face() as face:
            with pytest.raises(OSError, match=f"cannot listen on {face.address} for HTTP"):
                async with HttpServer(lambda scope, receive, send: None, face.address):  # type: ignore[arg-type,return-value]
                    pass

    asyncio.run(main())
