"""One worker's Publish stream, as far as its answers go."""

import asyncio
from collections.abc import AsyncGenerator

from protos.baton.v1 import kv_index_pb2
from services.core.errors import InvalidRequest
from services.mesh.block_events import BlockChange


class PublishSession:
    """Answers are merged: however many there are to give, one response gives them."""

    def __init__(self) -> None:
        self._worker: tuple[str, int] | None = None
        self._acknowledged = 0
        self._snapshot_wanted = False  # and not yet come
        self._say_so = False
        self._news = asyncio.Event()
        self._finished = False
        self._end: Exception | None = None

    def identify(self, change: BlockChange) -> bool:
        """Whether this is the stream's first event. Raises InvalidRequest when it speaks for another worker than the first one did."""
        worker = (change.worker_id, change.epoch)
        if self._worker is None:
            self._worker = worker
            return True
        if worker != self._worker:
            raise InvalidRequest("event.worker", f"is {worker}; this stream is that of {self._worker}")
        return False

    @property
    def worker_id(self) -> str | None:
        return None if self._worker is None else self._worker[0]

    def acknowledge(self, epoch: int, sequence_number: int) -> None:
        """Everything up to `sequence_number` is safe. Does nothing when that was said of another start of the worker."""
        if self._worker is not None and self._worker[1] == epoch:
            self._acknowledged = max(self._acknowledged, sequence_number)
            self._news.set()

    def answer(self) -> None:
        """Repeats what is acknowledged: a sign of life."""
        self._news.set()

    def want_snapshot(self) -> None:
        """Asks for a snapshot, once until it comes."""
        if not self._snapshot_wanted:
            self._snapshot_wanted = self._say_so = True
        self._news.set()

    def snapshot_came(self) -> None:
        self._snapshot_wanted = False

    def finish(self) -> None:
        """The worker says no more: the stream ends after one last answer."""
        self._finished = True
        self._news.set()

    def end(self, error: Exception) -> None:
        """The stream ends with `error`."""
        self._end = self._end or error
        self._news.set()

    async def responses(self) -> AsyncGenerator[kv_index_pb2.PublishResponse, None]:
        """Until the session is finished; raises the error it was ended with."""
        finished = False
        while not finished:
            await self._news.wait()
            self._news.clear()
            if self._end is not None:
                raise self._end
            finished = self._finished
            need_snapshot, self._say_so = self._say_so, False
            yield kv_index_pb2.PublishResponse(sequence_number=self._acknowledged, need_snapshot=need_snapshot)
