"""Baton's own gRPC: Generate, its requests serialized beforehand."""

import time
from typing import Any

import grpc

from loadtest.clients.answer import Answer
from protos.baton.v1 import inference_pb2
from services.core.errors import BatonError, ResourceExhausted, Unavailable
from services.core.prefix_hash import TOKEN_BYTES
from services.mesh import status
from services.mesh.client import open_channel

_METHOD = "/baton.v1.InferenceService/Generate"


class GrpcClient:
    """Over a few connections in turn: one carries a hundred streams at most before others wait."""

    def __init__(self, address: str, *, num_channels: int = 4) -> None:
        self._address = address
        self._channels = [open_channel(address) for _ in range(num_channels)]
        self._calls: list[Any] = [
            channel.unary_stream(_METHOD, request_serializer=None, response_deserializer=inference_pb2.GenerateResponse.FromString)
            for channel in self._channels
        ]
        self._turn = 0

    async def connect(self) -> None:
        """So that no request pays for the connection. Raises PeerUnavailable."""
        for channel in self._channels:
            channel.get_state(try_to_connect=True)
            await channel.channel_ready()

    async def send(self, payload: bytes, answer: Answer, timeout_s: float) -> None:
        self._turn = (self._turn + 1) % len(self._calls)
        answer.sent_s = time.monotonic()
        call = self._calls[self._turn](payload, timeout=timeout_s)
        try:
            async for response in call:
                self._take(response, answer)
        except grpc.aio.AioRpcError as error:
            _explain(answer, status.from_rpc_error(error, self._address))
        finally:
            answer.finished_s = time.monotonic()
            call.cancel()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    def _take(self, response: inference_pb2.GenerateResponse, answer: Answer) -> None:
        packed = response.token_ids.packed
        if packed:
            num_tokens = len(packed) // TOKEN_BYTES
            answer.token_times.append((time.monotonic(), num_tokens))
            answer.output_tokens += num_tokens
            answer.content.update(packed)
        if response.HasField("usage"):
            answer.input_tokens = response.usage.prompt_tokens
            answer.cached_tokens = response.usage.cached_tokens
            answer.is_complete = True
        if response.HasField("timing"):
            answer.timing = response.timing


def _explain(answer: Answer, error: BatonError) -> None:
    answer.error = f"{type(error).__name__}: {error.message}"
    answer.is_refused = isinstance(error, ResourceExhausted)
    if isinstance(error, ResourceExhausted | Unavailable):
        answer.retry_after_s = error.retry_after_s
