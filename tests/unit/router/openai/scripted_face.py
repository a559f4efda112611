"""The HTTP face behind a real socket, with a generate() that does what the test says instead of a mesh."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from protos.baton.v1 import common_pb2, inference_pb2
from services.core.types import FinishReason, TokenLogprobs
from services.engine.demo import TARGET_DIR
from services.router.openai.app import OpenAIApp
from services.router.openai.pieces import Piece
from services.router.openai.protocol import Limits
from services.router.openai.server import HttpServer
from services.router.prompts import Prompts
from services.router.request import Delta, GenerationRequest, Summary
from services.tokenizer.tokenizer import Tokenizer

IDENTITY = common_pb2.ModelIdentity(model_name="demo", model_fingerprint=b"m" * 16, block_size=16, max_model_len=4096, vocab_size=4096)
TOKENIZER = Tokenizer.from_checkpoint(TARGET_DIR)
WORD = TOKENIZER.encode(" = None")
Script = Callable[[GenerationRequest], AsyncGenerator[Piece, None]]


def summary(request: GenerationRequest, completion_tokens: int) -> Summary:
    return Summary(
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=completion_tokens,
        cached_tokens=1,
        timing=inference_pb2.RequestTiming(request_id=request.request_id, ttft_s=0.5),
    )


async def answer(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
    """Two tokens for each choice, then the end."""
    top = TokenLogprobs(chosen=-0.5, top=((WORD[0], -0.5), (WORD[1], -1.5)))
    logprobs = () if request.sampling.logprobs is None else (top,)
    for choice in range(request.sampling.n):
        yield Delta(choice, " =", WORD[:1], logprobs, None)
    for choice in range(request.sampling.n):
        yield Delta(choice, " None", WORD[1:], logprobs, FinishReason.LENGTH)
    yield summary(request, 2 * request.sampling.n)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    def events(self) -> list[Any]:
        """Of a stream, the last word left out."""
        texts = [event.removeprefix("data: ") for event in self.body.decode().split("\n\n") if event]
        return [msgspec.json.decode(text) for text in texts if text != "[DONE]"]


@dataclass
class Face:
    """`seen`: what generate() was asked for. `ended`: of those, what has ended, for whatever reason."""

    address: str
    server: HttpServer
    seen: list[GenerationRequest] = field(default_factory=list)
    ended: list[GenerationRequest] = field(default_factory=list)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self.address.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def post(self, path: str, body: object, headers: Sequence[str] = (), *, kind: str = "application/json") -> Reply:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return await self.send(request_bytes(path, data, headers, kind=kind))

    async def get(self, path: str) -> Reply:
        return await self.send(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())

    async def send(self, data: bytes) -> Reply:
        """Bytes as they are; the reply that comes back, to the end of the connection."""
        reader, writer = await self.connect()
        try:
            writer.write(data)
            async with asyncio.timeout(20):
                return read_reply(await reader.read())
        finally:
            writer.close()


def request_bytes(
    path: str, data: bytes, headers: Sequence[str] = (), *, kind: str = "application/json", num_bytes: int | None = None
) -> bytes:
    """`num_bytes`: what is said of the body's length; None: the truth."""
    length = len(data) if num_bytes is None else num_bytes
    lines = [f"POST {path} HTTP/1.1", "host: x", "connection: close", f"content-type: {kind}", f"content-length: {length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def read_reply(data: bytes) -> Reply:
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        parts, rest = [], body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            parts.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        body = b"".join(parts)
    return Reply(int(first.split()[1]), headers, body)


@contextlib.asynccontextmanager
async def scripted_face(
    script: Script = answer, *, limits: Limits | None = None, can_serve: bool = True, tokenizer: Tokenizer = TOKENIZER
) -> AsyncIterator[Face]:
    async def generate(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        face.seen.append(request)
        try:
            async with contextlib.aclosing(script(request)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            face.ended.append(request)

    members = cast(Any, SimpleNamespace(require_identity=lambda: IDENTITY, model_name="demo"))
    app = OpenAIApp(generate, Prompts(members, tokenizer), can_serve=lambda: can_serve)
    server = HttpServer(app, "127.0.0.1:0", limits=limits)
    async with server:
        face = Face(server.address, server)
        yield face


def run(test: Callable[[Face], Coroutine[Any, Any, None]], script: Script = answer, **settings: Any) -> None:
    async def main() -> None:
        async with scripted_face(script, **settings) as face:
            await test(face)

    asyncio.run(main())


async def timed(wait: Coroutine[Any, Any, Any]) -> float:
    started = time.monotonic()
    await wait
    return time.monotonic() - started
