"""The router's gRPC face: InferenceService for clients, StatusService for those who watch. Turns messages into requests and back."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from protos.baton.v1 import inference_pb2, inference_pb2_grpc, status_pb2, status_pb2_grpc
from services.core.errors import InvalidRequest
from services.mesh import convert, logs
from services.mesh.telemetry import trace_context
from services.router.choice import check_num_stops
from services.router.generation import Generator
from services.router.members import Members
from services.router.prompts import Prompts
from services.router.request import Delta, GenerationRequest, PromptLogprobs, Summary

SCORES_PER_RESPONSE = 512


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """What clients call."""

    def __init__(self, generator: Generator, members: Members, prompts: Prompts) -> None:
        self._generator = generator
        self._members = members
        self._prompts = prompts

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        received_at, remaining_s = time.perf_counter(), context.time_remaining()
        identity = self._prompts.identity(request.model)
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
                elif isinstance(piece, PromptLogprobs):
                    # In pieces, so that other requests get their turn, and none is too large for a client.
                    for start in range(0, len(piece.logprobs), SCORES_PER_RESPONSE):
                        some = piece.logprobs[start : start + SCORES_PER_RESPONSE]
                        yield inference_pb2.GenerateResponse(prompt_logprobs=map(convert.logprobs_to_proto, some))
                        await asyncio.sleep(0)
                else:
                    yield _summary_to_proto(piece, with_timing=request.include_timing)

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        identity = self._prompts.identity(request.model)
        match request.WhichOneof("kind"):
            case "text":
                token_ids = await self._prompts.encode(request.text, "text", add_special_tokens=not request.without_special_tokens)
            case "chat":
                token_ids = await self._encode_chat(request.chat)
            case _:
                raise InvalidRequest("kind", "give either text or chat")
        return inference_pb2.TokenizeResponse(token_ids=convert.token_ids_to_proto(token_ids), max_model_len=identity.max_model_len)

    async def Detokenize(self, request: inference_pb2.DetokenizeRequest, context: Any) -> inference_pb2.DetokenizeResponse:
        self._prompts.identity(request.model)
        token_ids = convert.token_ids_from_proto(request.token_ids, "token_ids")
        return inference_pb2.DetokenizeResponse(text=await self._prompts.decode(token_ids, "token_ids"))

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
                    block_size=model.block_size,
                    block_bytes=model.block_bytes,
                )
                for model in models
            ]
        )

    async def _prompt_ids(self, prompt: inference_pb2.Prompt) -> list[int]:
        match prompt.WhichOneof("kind"):
            case "text":
                return await self._prompts.encode(prompt.text, "prompt.text", add_special_tokens=True)
            case "token_ids":
                return convert.token_ids_from_proto(prompt.token_ids, "prompt.token_ids")
            case "chat":
                return await self._encode_chat(prompt.chat)
            case _:
                raise InvalidRequest("prompt", "give a text, token_ids or a chat")

    async def _encode_chat(self, chat: inference_pb2.Chat) -> list[int]:
        if not chat.messages:
            raise InvalidRequest("chat.messages", "is empty", limit=1)
        self._prompts.check_num_messages(len(chat.messages), "chat.messages")  # before a million of them are copied
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        return await self._prompts.encode_chat(messages, "chat", num_characters=chat.ByteSize())


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
