"""The routes of the HTTP face: bodies in, answers or events out, over the same generate() as gRPC.

Knows ASGI and nothing of sockets. A client that leaves cancels the task in which a route runs (protocol.py), and with it all of its work.
"""

import asyncio
import importlib.metadata
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from services.core.errors import InvalidRequest, PeerUnavailable
from services.core.types import SamplingParams
from services.mesh import convert, logs
from services.mesh.server import REQUEST_ID_METADATA, accept_request_id, only_one
from services.mesh.telemetry import trace_context
from services.router.openai import requests
from services.router.openai.answers import StreamedAnswer, WholeAnswer
from services.router.openai.errors import reply_to
from services.router.openai.logprobs import token_texts
from services.router.openai.pieces import Generate
from services.router.openai.responses import Echo, Form, Stream, Whole
from services.router.prompts import Prompts
from services.router.request import GenerationRequest

MAX_BODY_BYTES = 8 << 20
# A body of this size takes about a millisecond to read; larger ones are read in a thread.
LONG_BODY_BYTES = 64 << 10
TIMEOUT_HEADER = "x-request-timeout"  # seconds
TIMING_HEADER = "x-baton-timing"

_Parsed = TypeVar("_Parsed")


class OpenAIApp:
    """The ASGI application; `can_serve` says whether a request would find a worker."""

    def __init__(self, generate: Generate, prompts: Prompts, *, can_serve: Callable[[], bool]) -> None:
        self._generate = generate
        self._prompts = prompts
        self._can_serve = can_serve
        self._text_of = token_texts(prompts.tokenizer)
        self._created = int(time.time())
        self._router = Router(
            [
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{model:path}", self._model, methods=["GET"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/detokenize", self._detokenize, methods=["POST"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/version", self._version, methods=["GET"]),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: named, answered, and its errors told."""
        assert scope["type"] == "http"
        headers = Headers(scope=scope)
        logs.request_id.set(accept_request_id(headers.items()))
        scope["app"] = self  # without it, starlette answers unknown routes by itself
        has_begun = False

        async def send_named(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                name = (REQUEST_ID_METADATA.encode(), logs.request_id.get().encode())
                message = {**message, "headers": [*message["headers"], name]}
            await send(message)

        try:
            await self._router(scope, receive, send_named)
        except (Exception, BaseExceptionGroup) as error:
            reply = reply_to(only_one(error), logs.request_id.get())
            if has_begun:
                # Too late for a status: clients find this in the stream, which then ends without its last word.
                event = b"data: " + reply.body + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": False})
                return
            more = error.headers if isinstance(error, HTTPException) else None
            await Response(reply.body, reply.status, {**reply.headers, **(more or {})})(scope, receive, send_named)

    async def _completions(self, request: Request) -> Response:
        received_at = time.perf_counter()
        wanted = await _parse(request, requests.parse_completion)
        options = wanted.options
        _name(request, options.request_id)
        identity = self._prompts.identity(options.model)
        texts = [prompt for prompt in wanted.prompts if isinstance(prompt, str)]
        prompts = [prompt for prompt in wanted.prompts if not isinstance(prompt, str)]
        if texts:
            prompts = await self._prompts.encode_all(texts, "prompt", add_special_tokens=wanted.add_special_tokens)
        sampling = convert.sampling_from_proto(options.sampling, identity.defaults)
        if wanted.echo:
            texts = texts or [await self._prompts.decode(prompt, "prompt") for prompt in prompts]
            sampling = replace(sampling, prompt_logprobs=sampling.logprobs)
        generation = []
        for number, request_id in enumerate(_names(len(prompts))):
            room = max(1, identity.max_model_len - len(prompts[number]))
            limited = sampling
            if sampling.max_tokens is None:
                limited = replace(sampling, max_tokens=min(requests.DEFAULT_COMPLETION_TOKENS, room))
            generation.append(_generation(request, options, request_id, prompts[number], limited, received_at))
        echoes = [Echo(text=text, token_ids=prompt) for text, prompt in zip(texts, prompts, strict=True)] if wanted.echo else []
        form = self._form(request, options, generation, is_chat=False)
        return self._answer(options, generation, replace(form, echoes=echoes, show_completion=wanted.show_completion))

    async def _chat(self, request: Request) -> Response:
        received_at = time.perf_counter()
        wanted = await _parse(request, requests.parse_chat)
        options = wanted.options
        _name(request, options.request_id)
        identity = self._prompts.identity(options.model)
        prompt = await self._prompts.encode_chat(
            wanted.messages,
            "messages",
            num_characters=wanted.num_characters,
            add_generation_prompt=wanted.add_generation_prompt,
            add_special_tokens=wanted.add_special_tokens,
            tools=wanted.tools,
            documents=wanted.documents,
            variables=wanted.variables,
        )
        sampling = convert.sampling_from_proto(options.sampling, identity.defaults)
        generation = [_generation(request, options, logs.request_id.get(), prompt, sampling, received_at)]
        return self._answer(options, generation, self._form(request, options, generation, is_chat=True))

    def _form(self, request: Request, options: requests.Options, generation: Sequence[GenerationRequest], *, is_chat: bool) -> Form:
        first = generation[0].sampling
        return Form(
            is_chat=is_chat,
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{logs.request_id.get()}",
            created=int(time.time()),
            model=self._prompts.model_name,
            fingerprint=f"fp_{self._prompts.identity().model_fingerprint.hex()[:16]}",
            num_choices=first.n,
            num_prompts=len(generation),
            prompt_tokens=sum(len(each.prompt_token_ids) for each in generation),
            with_logprobs=first.logprobs is not None,
            with_timing=options.with_timing or request.headers.get(TIMING_HEADER) == "1",
            include_usage=options.include_usage,
            continuous_usage=options.continuous_usage,
        )

    def _answer(self, options: requests.Options, generation: Sequence[GenerationRequest], form: Form) -> Response:
        if options.stream:
            return StreamedAnswer(self._generate, generation, Stream(form, self._prompts.tokenizer, self._text_of))
        return WholeAnswer(self._generate, generation, Whole(form, self._prompts.tokenizer, self._text_of))

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._card()] if self._can_serve() else []})

    async def _model(self, request: Request) -> Response:
        self._prompts.identity(request.path_params["model"])
        return _json(self._card())

    def _card(self) -> dict[str, object]:
        name = self._prompts.model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "baton",
            "root": name,
            "parent": None,
            "max_model_len": self._prompts.identity().max_model_len,
        }

    async def _tokenize(self, request: Request) -> Response:
        wanted = await _parse(request, requests.parse_tokenize)
        identity = self._prompts.identity(wanted.model)
        if wanted.prompt is not None:
            token_ids = await self._prompts.encode(wanted.prompt, "prompt", add_special_tokens=wanted.add_special_tokens)
        else:
            token_ids = await self._prompts.encode_chat(
                wanted.messages,
                "messages",
                num_characters=wanted.num_characters,
                add_generation_prompt=wanted.add_generation_prompt,
                add_special_tokens=wanted.add_special_tokens,
                tools=wanted.tools,
                variables=wanted.variables,
            )
        strings = [self._text_of(token_id).text for token_id in token_ids] if wanted.with_token_strings else None
        return _json({"count": len(token_ids), "max_model_len": identity.max_model_len, "tokens": token_ids, "token_strs": strings})

    async def _detokenize(self, request: Request) -> Response:
        wanted = await _parse(request, requests.parse_detokenize)
        self._prompts.identity(wanted.model)
        return _json({"prompt": await self._prompts.decode(wanted.tokens, "tokens")})

    async def _health(self, request: Request) -> Response:
        if not self._can_serve():
            raise PeerUnavailable("no decode worker takes requests here now")
        return Response(status_code=200)

    async def _version(self, request: Request) -> Response:
        return _json({"version": importlib.metadata.version("baton")})


def _name(request: Request, request_id: str | None) -> None:
    """A header wins over the body's request_id."""
    if request_id is not None and REQUEST_ID_METADATA not in request.headers:
        logs.request_id.set(accept_request_id([(REQUEST_ID_METADATA, request_id)]))


def _names(num_prompts: int) -> list[str]:
    """In a batch each prompt has a name of its own, in logs and on the workers."""
    name = logs.request_id.get()
    return [name] if num_prompts == 1 else [f"{name}-{number}" for number in range(num_prompts)]


def _generation(
    request: Request, options: requests.Options, request_id: str, prompt: Sequence[int], sampling: SamplingParams, received_at: float
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=sampling,
        stop=options.stop,
        cache_salt=options.cache_salt,
        remaining_s=_timeout_s(request),
        trace_context=trace_context(request.headers.items()),
        received_at=received_at,
        tokenize_s=time.perf_counter() - received_at,
    )


def _timeout_s(request: Request) -> float | None:
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise InvalidRequest(TIMEOUT_HEADER, f"{text!r} is not a number of seconds")
    return timeout_s


async def _parse(request: Request, parse: Callable[[bytes], _Parsed]) -> _Parsed:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("", "application/json"):
        raise HTTPException(415, f"content-type is {kind!r}; only application/json is taken")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "content-encoding is not taken; send the body as it is")
    body = await _read_body(request)
    return parse(body) if len(body) <= LONG_BODY_BYTES else await asyncio.to_thread(parse, body)


async def _read_body(request: Request) -> bytes:
    length = request.headers.get("content-length", "0")
    size = int(length) if length.isascii() and length.isdigit() else 0
    body = bytearray()
    if size <= MAX_BODY_BYTES:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:  # whatever was announced, if anything was
                break
        else:
            return bytes(body)
    raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES} bytes")


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
