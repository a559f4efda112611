"""PrefillService: one streaming call for each prompt; its end, however it comes, frees all that it held.

    accepted ─▶ (progress │ block)* ─▶ done

Blocks leave chunk by chunk while the engine computes the next chunk. Knows nothing of routing: whoever calls has a grant.
"""

import asyncio
import bisect
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from protos.baton.v1 import prefill_pb2, prefill_pb2_grpc
from services.core.clock import unix_s
from services.core.errors import Draining, Incompatible, InvalidRequest
from services.engine.events import PrefillProgress
from services.engine.kv_groups import Place
from services.engine.sequence import EngineRequest
from services.mesh import convert, failpoints, logs
from services.mesh.kv_transport import KVSender, OutgoingTransfer
from services.mesh.server import REQUEST_ID_METADATA, accept_request_id
from services.mesh.streams import HEARTBEAT_S, with_heartbeats
from services.worker.runtime import Worker

LOAD_INTERVAL_S = 0.05
# How long a block may take that is on its way when the transfer ends.
STOP_S = 1.0
# Of the engine's thread, which needs the interpreter to begin, while its first step takes longer than what is to be done beside it.
_HEAD_START_S = 0.001


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Serves one Worker; `sender` pushes from its pool."""

    def __init__(self, worker: Worker, sender: KVSender, *, transports: Sequence[str]) -> None:
        self._worker = worker
        self._sender = sender
        self._transports = transports
        self._num_calls = 0

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> AsyncGenerator[prefill_pb2.PrefillEvent, None]:
        # Not from metadata, which were sent before there was a request if the call was opened ahead.
        logs.request_id.set(accept_request_id(((REQUEST_ID_METADATA, request.request_id),)))
        worker = self._worker
        if worker.draining:
            raise Draining(f"{worker.worker_id} is draining")
        if request.layout_fingerprint != worker.identity.layout_fingerprint:
            raise Incompatible(f"{worker.worker_id} serves another model than the caller, or keeps KV blocks in another form")
        # The caller's id may come twice (a second attempt while the first one ends), and from several callers.
        self._num_calls += 1
        token_ids = convert.token_ids_from_proto(request.token_ids, "token_ids")
        prompt, output = convert.split_prompt(token_ids, request.prompt_length)
        engine_request = EngineRequest(
            request_id=f"{request.request_id}#{self._num_calls}",
            prompt_token_ids=prompt,
            sampling=convert.sampling_from_proto(request.sampling),
            prefix_key=request.prefix_key or None,
            output_token_ids=output,
        )
        if len(token_ids) >= worker.identity.max_model_len:  # before anything as long as it is made of it
            most = worker.identity.max_model_len - 1
            raise InvalidRequest("token_ids", f"are {len(token_ids)}; the model takes {most} and a new one", limit=most)
        places = worker.groups.places(len(token_ids), request.grant.first_block)
        block_ids = _granted_blocks(request.grant, num_places=len(places))
        async with contextlib.AsyncExitStack() as stack:
            # The engine begins while the transfer is agreed. Closed in this order: nothing reads the blocks any more, then the engine
            # gets them back.
            steps = await stack.enter_async_context(worker.engine.prefill(engine_request))
            await asyncio.sleep(_HEAD_START_S)
            transfer = await self._sender.open(request.grant.transfer_id, convert.endpoint_from_proto(request.grant.endpoint), block_ids)
            stack.push_async_callback(transfer.stop, STOP_S)
            await failpoints.reach("prefill.accepted", request.request_id)
            yield prefill_pb2.PrefillEvent(
                accepted=prefill_pb2.PrefillAccepted(worker_id=worker.worker_id, kv_transport=transfer.transport)
            )
            push = await stack.enter_async_context(contextlib.aclosing(self._push(steps, transfer, request, places)))
            events = await stack.enter_async_context(contextlib.aclosing(with_heartbeats(push)))
            async for event in events:
                yield event or self._heartbeat()

    async def _push(
        self,
        steps: AsyncIterator[PrefillProgress],
        transfer: OutgoingTransfer,
        request: prefill_pb2.PrefillRequest,
        places: Sequence[Place],
    ) -> AsyncGenerator[prefill_pb2.PrefillEvent, None]:
        """Sends the blocks of `places` as they are completed; ends with `done`, when the last one is out."""
        memory, num_sent = self._worker.memory, 0
        first_sent_at: float | None = None
        async for progress in steps:
            await failpoints.reach("prefill.mid_prefill", request.request_id)
            heard_at = time.perf_counter()
            is_last = progress.first_tokens is not None
            num_complete = progress.num_computed_tokens // self._worker.block_size
            end = len(places) if is_last else bisect.bisect_left(places, num_complete, key=lambda place: place.block)
            # Places come in the order of blocks, and those granted are the last ones.
            source_ids = progress.block_ids[len(progress.block_ids) - len(places) :]
            fresh = [(index, source_ids[index]) for index in range(num_sent, end)]
            num_sent = max(num_sent, end)
            if fresh and first_sent_at is None:
                first_sent_at = heard_at
            for block in await transfer.send(fresh):
                yield prefill_pb2.PrefillEvent(block=prefill_pb2.KVBlock(index=block.index, data=block.data, checksum=block.checksum))
            self._worker.kv_bytes_sent += sum(memory.map.size(block_id) for _, block_id in fresh)
            await failpoints.reach("prefill.before_done" if is_last else "prefill.mid_transfer", request.request_id)
            if is_last:
                await transfer.finish()
                assert first_sent_at is not None
                yield _done(progress, request, blocks_sent=len({place.block for place in places}), first_sent_at=first_sent_at)
                return
            yield self._progress(progress.num_computed_tokens)

    async def WatchLoad(self, request: prefill_pb2.WatchLoadRequest, context: Any) -> AsyncGenerator[prefill_pb2.WatchLoadResponse, None]:
        worker = self._worker
        yield prefill_pb2.WatchLoadResponse(
            worker=worker.id_message, model=worker.identity, kv_transports=self._transports, load=worker.load()
        )
        while True:
            # Twenty times a second while there is news, for a router that chooses by it; twice a second when idle.
            before = worker.load()
            for _ in range(round(HEARTBEAT_S / LOAD_INTERVAL_S)):
                await asyncio.sleep(LOAD_INTERVAL_S)
                if worker.load() != before:
                    break
            yield prefill_pb2.WatchLoadResponse(load=worker.load())

    def _heartbeat(self) -> prefill_pb2.PrefillEvent:
        return self._progress(0)

    def _progress(self, computed_tokens: int) -> prefill_pb2.PrefillEvent:
        return prefill_pb2.PrefillEvent(
            progress=prefill_pb2.PrefillProgress(computed_tokens=computed_tokens, engine_steps=self._worker.engine.stats().steps)
        )


def _granted_blocks(grant: prefill_pb2.KVGrant, *, num_places: int) -> list[int]:
    """Raises InvalidRequest unless the grant has a block for each place of the prompt that the caller lacks."""
    if len(grant.block_ids) % 4:
        raise InvalidRequest("grant.block_ids", f"has {len(grant.block_ids)} bytes, which is not a multiple of 4", limit=4)
    block_ids = convert.unpack_u32(grant.block_ids)
    if len(block_ids) != num_places or not block_ids:
        raise InvalidRequest(
            "grant", f"has {len(block_ids)} blocks for {num_places} places from block {grant.first_block} on", limit=num_places
        )
    return block_ids


def _done(
    progress: PrefillProgress, request: prefill_pb2.PrefillRequest, *, blocks_sent: int, first_sent_at: float
) -> prefill_pb2.PrefillEvent:
    first_tokens, timing = progress.first_tokens, progress.timing
    assert first_tokens is not None and timing is not None
    now = time.perf_counter()
    return prefill_pb2.PrefillEvent(
        done=prefill_pb2.PrefillDone(
            first_tokens=[
                prefill_pb2.FirstToken(
                    token_id=token.token_id, logprobs=None if token.logprobs is None else convert.logprobs_to_proto(token.logprobs)
                )
                for token in first_tokens
            ],
            cached_tokens=progress.cached_tokens,
            blocks_sent=blocks_sent,
            transfer_s=now - first_sent_at,
            to_prefill_s=unix_s(timing.queued_at) - request.sent_unix_s,
            queue_s=timing.queue_s,
            prefill_s=timing.prefill_s,
            model_s=timing.model_s,
            since_first_token_s=now - timing.sampled_at,
            sent_unix_s=unix_s(now),
        )
    )
