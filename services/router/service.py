"""The router's gRPC face: InferenceService for clients, StatusService for those who watch. Turns messages into requests and back."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from protos.baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc, status_pb2, status_pb2_grpc
from services.core.errors import InvalidRequest, UnknownModel
from services.mesh import convert, logs
from services.mesh.telemetry import trace_context
from services.router.choice import check_num_stops
from services.router.generation import Delta, GenerationRequest, Generator, Summary
from services.router.members import Members
from services.tokenizer.tokenizer import Tokenizer

# Above this the tokenizer would hold up everybody else's tokens; it releases the interpreter lock.
LONG_TEXT_CHARACTERS = 4_000
LONG_CHAT_MESSAGES = 64


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """What clients call."""

    def __init__(self, generator: Generator, members: Members, tokenizer: Tokenizer) -> None:
        self._generator = generator
        self._members = members
        self._tokenizer = tokenizer

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        received_at, remaining_s = time.perf_counter(), context.time_remaining()
        identity = self._identity(request.model)
        prompt = await self._prompt_ids(request.prompt)
        generation = GenerationRequest(
            request_id=logs.request_id.get(),
            prompt_token_ids=prompt,
            sampling=convert.sampling_from_proto(request.sampling, identity.defaults),
            stop=_stops(request),
            cache_salt=request.cache_salt.encode(),
            remaining_s=remaining_s,
            trace_context=trace_context(context.invocation_metadata()),
            received_at=received_at,
            tokenize_s=time.perf_counter() - received_at,
        )
        async with contextlib.aclosing(self._generator.generate(generation)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Delta):
                    yield _delta_to_proto(piece)
                else:
                    yield _summary_to_proto(piece, with_timing=request.include_timing)

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        identity = self._identity(request.model)
        match request.WhichOneof("kind"):
            case "text":
                token_ids = await self._encode(request.text, "text", add_special_tokens=not request.without_special_tokens)
            case "chat":
                token_ids = await self._encode_chat(request.chat)
            case _:
                raise InvalidRequest("kind", "give either text or chat")
        return inference_pb2.TokenizeResponse(token_ids=convert.token_ids_to_proto(token_ids), max_model_len=identity.max_model_len)

    async def Detokenize(self, request: inference_pb2.DetokenizeRequest, context: Any) -> inference_pb2.DetokenizeResponse:
        identity = self._identity(request.model)
        token_ids = convert.token_ids_from_proto(request.token_ids, "token_ids")
        if len(token_ids) > identity.max_model_len:
            raise InvalidRequest(
                "token_ids",
                f"has {len(token_ids)} tokens; the model's sequences have no more than {identity.max_model_len}",
                limit=identity.max_model_len,
            )
        if token_ids and max(token_ids) >= identity.vocab_size:
            raise InvalidRequest(
                "token_ids", f"token id {max(token_ids)} is outside the vocabulary of {identity.vocab_size}", limit=identity.vocab_size - 1
            )
        return inference_pb2.DetokenizeResponse(text=await asyncio.to_thread(self._tokenizer.decode, token_ids))

    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: Any) -> inference_pb2.ListModelsResponse:
        identity = self._members.identity
        models = [] if identity is None else [identity]
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(
                    name=self._members.model_name,
                    max_model_len=model.max_model_len,
                    vocab_size=model.vocab_size,
                    model_fingerprint=model.model_fingerprint,
                )
                for model in models
            ]
        )

    def _identity(self, model: str) -> common_pb2.ModelIdentity:
        identity = self._members.require_identity()
        if model not in ("", self._members.model_name):
            raise UnknownModel(f"model {model!r} is not served here; {self._members.model_name!r} is")
        return identity

    async def _prompt_ids(self, prompt: inference_pb2.Prompt) -> list[int]:
        match prompt.WhichOneof("kind"):
            case "text":
                return await self._encode(prompt.text, "prompt.text", add_special_tokens=True)
            case "token_ids":
                return convert.token_ids_from_proto(prompt.token_ids, "prompt.token_ids")
            case "chat":
                return await self._encode_chat(prompt.chat)
            case _:
                raise InvalidRequest("prompt", "give a text, token_ids or a chat")

    async def _encode_chat(self, chat: inference_pb2.Chat) -> list[int]:
        if not chat.messages:
            raise InvalidRequest("chat.messages", "is empty", limit=1)
        # Whatever the template writes for a message, it is a token at least.
        limit = self._members.require_identity().max_model_len
        if len(chat.messages) > limit:
            raise InvalidRequest("chat.messages", f"are {len(chat.messages)}; the model takes {limit} tokens", limit=limit)
        messages: Sequence[dict[str, object]] = [{"role": message.role, "content": message.content} for message in chat.messages]
        num_characters = sum(len(message.role) + len(message.content) for message in chat.messages)
        self._check_length(num_characters, "chat")
        if num_characters <= LONG_TEXT_CHARACTERS and len(messages) <= LONG_CHAT_MESSAGES:
            text = self._tokenizer.apply_chat_template(messages)
        else:
            text = await asyncio.to_thread(self._tokenizer.apply_chat_template, messages)
        # The template writes the special tokens itself.
        return await self._encode(text, "chat", add_special_tokens=False)

    def _check_length(self, num_characters: int, field: str) -> None:
        # Before any work: ten megabytes would keep the tokenizer busy for seconds, to be refused for their number of tokens afterwards.
        limit = self._members.require_identity().max_model_len * self._tokenizer.max_token_characters
        if num_characters > limit:
            raise InvalidRequest(field, f"has {num_characters} characters; the model takes no text of more than {limit}", limit=limit)

    async def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        self._check_length(len(text), field)
        if len(text) <= LONG_TEXT_CHARACTERS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)


class StatusServicer(status_pb2_grpc.StatusServiceServicer):
    """What watchers call."""

    def __init__(self, generator: Generator, members: Members) -> None:
        self._generator = generator
        self._members = members

    async def WatchStatus(
        self, request: status_pb2.WatchStatusRequest, context: Any
    ) -> AsyncGenerator[status_pb2.WatchStatusResponse, None]:
        interval_s = request.interval_s or 1.0
        if not 0.1 <= interval_s <= 60.0:
            raise InvalidRequest("interval_s", f"{interval_s} is outside [0.1, 60]", limit="[0.1, 60]")
        while True:
            message = self._members.status()
            self._generator.statistics.fill(message)
            yield message
            await asyncio.sleep(interval_s)


def _stops(request: inference_pb2.GenerateRequest) -> tuple[str, ...]:
    check_num_stops(len(request.stop))  # before a million of them are copied
    return tuple(request.stop)


def _delta_to_proto(delta: Delta) -> inference_pb2.GenerateResponse:
    # Once for each token: only what is there is set, and by assignment, which costs half of what keyword arguments do.
    choice, text, token_ids, logprobs, finish_reason = delta
    response = inference_pb2.GenerateResponse()
    response.choice = choice
    response.text = text
    response.token_ids.packed = token_ids[0].to_bytes(4, "little") if len(token_ids) == 1 else convert.pack_u32(token_ids)
    if logprobs:
        response.logprobs.extend(map(convert.logprobs_to_proto, logprobs))
    if finish_reason is not None:
        response.finish_reason = convert.finish_reason_to_proto(finish_reason)
    return response


def _summary_to_proto(summary: Summary, *, with_timing: bool) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        usage=inference_pb2.Usage(
            prompt_tokens=summary.prompt_tokens, completion_tokens=summary.completion_tokens, cached_tokens=summary.cached_tokens
        ),
        timing=summary.timing if with_timing else None,
    )
