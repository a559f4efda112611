"""The rpcs of KVIndexService over a Keeper. Errors of the tree leave it as they are; the server's interceptor makes them statuses."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from protos.baton.v1 import kv_index_pb2, kv_index_pb2_grpc
from services.core.errors import InvalidRequest
from services.kv_index.keeper import Keeper
from services.kv_index.session import PublishSession
from services.mesh.convert import hashes_from_bytes

SERVICE_NAME: str = kv_index_pb2.DESCRIPTOR.services_by_name["KVIndexService"].full_name
MAX_MATCH_HASHES = 1 << 16
_BIG_EVENT_BYTES = 1 << 13


class KVIndexServicer(kv_index_pb2_grpc.KVIndexServiceServicer):
    """See kv_index.proto for the contract of each rpc."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._big_event = asyncio.Lock()

    async def Publish(
        self, requests: AsyncIterator[kv_index_pb2.PublishRequest], context: Any
    ) -> AsyncIterator[kv_index_pb2.PublishResponse]:
        self._keeper.require_serving()
        session = PublishSession()
        reader = asyncio.ensure_future(self._read(requests, session))
        try:
            async with contextlib.aclosing(session.responses()) as responses:
                async for response in responses:
                    yield response
        finally:
            reader.cancel()
            await asyncio.wait((reader,))
            self._keeper.leave(session)

    async def _read(self, requests: AsyncIterator[kv_index_pb2.PublishRequest], session: PublishSession) -> None:
        try:
            async for request in requests:
                if len(request.event.stored) + len(request.event.removed) < _BIG_EVENT_BYTES:
                    self._keeper.publish(session, request.event)
                    continue
                # One of these in each turn of the event loop, or the snapshots of many workers at once would hold up all else for seconds.
                async with self._big_event:
                    self._keeper.publish(session, request.event)
                    await asyncio.sleep(0)
        except Exception as error:  # whatever it is, it is the stream's end
            session.end(error)
        else:
            session.finish()

    async def Match(self, request: kv_index_pb2.MatchRequest, context: Any) -> kv_index_pb2.MatchResponse:
        hashes = hashes_from_bytes(request.hashes, "hashes")
        if len(hashes) > MAX_MATCH_HASHES:
            raise InvalidRequest("hashes", f"are {len(hashes)}, more than {MAX_MATCH_HASHES}", limit=MAX_MATCH_HASHES)
        index = self._keeper.index
        return kv_index_pb2.MatchResponse(
            matches=[
                kv_index_pb2.PrefixMatch(worker_id=worker_id, num_blocks=match.num_blocks)
                for match in reversed(index.match(hashes))
                for worker_id in index.workers_in(match.workers)
            ]
        )

    async def Watch(self, request: kv_index_pb2.WatchRequest, context: Any) -> AsyncIterator[kv_index_pb2.WatchResponse]:
        watcher = self._keeper.watch()
        try:
            async with contextlib.aclosing(watcher.responses()) as responses:
                async for response in responses:
                    yield response
        finally:
            self._keeper.unwatch(watcher)
