"""A decode worker without an engine, in a process of its own: tokens out of nowhere, at a given pace, through the real frames.

`python -m loadtest.micro.token_source STEP_MS`: each step gives every request one token; 0 steps as fast as the reader takes them.
Serves InferenceService.Generate too, a stream for each request with one message for each token: how frames would be without frames.
Prints its address.
"""

import asyncio
import functools
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import uvloop

from protos.baton.v1 import common_pb2, decode_pb2, decode_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.core.types import FinishReason, TokenEvent
from services.decode.frames import FrameBuilder
from services.mesh import convert
from services.mesh.server import MeshServer

VOCAB_SIZE = 4096
FIRST_WORD = 300  # ids of the demo tokenizer that are plain words from here on
IDENTITY = common_pb2.ModelIdentity(
    model_name="source",
    model_fingerprint=b"source",
    layout_fingerprint=b"source",
    block_size=16,
    block_bytes=1 << 15,
    max_model_len=1 << 20,
    vocab_size=VOCAB_SIZE,
)
LOAD_INTERVAL_S = 0.05  # as a decode worker's
LOAD = common_pb2.WorkerLoad(blocks_total=1 << 20, blocks_free=1 << 20, max_num_seqs=1024)


class _Request:
    def __init__(self, start: decode_pb2.Start) -> None:
        self.handle = start.handle
        self.position = len(start.token_ids.packed) // 4
        self.end = self.position + start.sampling.max_tokens

    def step(self) -> TokenEvent:
        self.position += 1
        return _event(self.position - 1, self.position == self.end)


@functools.cache  # an engine makes events on a thread of its own; here the event loop should not have to
def _event(position: int, is_last: bool) -> TokenEvent:
    return TokenEvent(
        request_id="",
        choice=0,
        token_id=FIRST_WORD + position % (VOCAB_SIZE - FIRST_WORD),
        position=position,
        logprobs=None,
        finish_reason=FinishReason.LENGTH if is_last else None,
        cached_tokens=0,
    )


class Source(decode_pb2_grpc.DecodeServiceServicer, inference_pb2_grpc.InferenceServiceServicer):
    """Both services over the same tokens."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def Session(  # noqa: N802
        self, commands: AsyncIterator[decode_pb2.SessionCommand], context: Any
    ) -> AsyncGenerator[decode_pb2.StepFrame, None]:
        requests: dict[int, _Request] = {}
        some = asyncio.Event()
        yield decode_pb2.StepFrame(
            hello=decode_pb2.SessionWelcome(worker=common_pb2.WorkerId(worker_id="source", epoch=1), model=IDENTITY), load=LOAD
        )

        async def obey() -> None:
            async for command in commands:
                if command.HasField("start"):
                    requests[command.start.handle] = _Request(command.start)
                    some.set()
                elif command.HasField("cancel"):
                    requests.pop(command.cancel.handle, None)

        frame, load_sent_at = FrameBuilder(), 0.0
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(obey())
            while not reader.done():
                if not requests:
                    some.clear()
                    try:
                        async with asyncio.timeout(0.5):
                            await some.wait()
                    except TimeoutError:
                        yield decode_pb2.StepFrame(load=LOAD)
                        continue
                for request in list(requests.values()):
                    frame.add_token(request.handle, request.step())
                    if request.position == request.end:
                        del requests[request.handle]
                is_load_due = time.monotonic() - load_sent_at >= LOAD_INTERVAL_S
                if is_load_due:
                    load_sent_at = time.monotonic()
                yield frame.take(LOAD if is_load_due else None)
                await asyncio.sleep(self._step_s)

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        for position in range(request.sampling.max_tokens):
            if self._step_s:  # all requests at once, as steps are
                await asyncio.sleep(self._step_s - time.monotonic() % self._step_s)
            yield inference_pb2.GenerateResponse(token_ids=convert.token_ids_to_proto([FIRST_WORD + position % (VOCAB_SIZE - FIRST_WORD)]))


async def main(step_s: float) -> None:
    """Serves until it is killed."""
    source = Source(step_s)

    def register(server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(source, server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(source, server)

    async with MeshServer("127.0.0.1:0", register, services=["baton.v1.DecodeService"]) as server:
        await server.set_serving(True)
        print(server.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(float(sys.argv[1]) / 1000))
