"""What Redis must still learn: every worker's events, merged into one batch until it is written. Pure; knows nothing of Redis itself.

    a worker is   in sync   there is nothing to write of it
                  waiting   a batch of it is to be written
                  refused   Redis did not have what its batch followed: nothing is kept of it until its next snapshot

While Redis is away batches are dropped, and nobody needs to remember whose: Redis will refuse what follows them.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.mesh.block_events import BlockChange


@dataclass(slots=True, kw_only=True)
class Batch:
    """Changes of one worker.

    follows           the sequence number that Redis must have for them to make sense; None: whatever Redis has is replaced
    sequence_number   what Redis has afterwards
    gone              the worker has left, and Redis is to forget it
    """

    worker_id: str
    epoch: int
    follows: int | None
    sequence_number: int
    removed: set[bytes] = field(default_factory=set)
    stored: set[bytes] = field(default_factory=set)
    gone: bool = False


class Journal:
    """Batches of all workers; while detached (Redis is away) it keeps none."""

    def __init__(self) -> None:
        self.attached = False
        self._waiting: dict[str, Batch] = {}
        self._refused: set[str] = set()
        self._pending = asyncio.Event()

    def needs_snapshot(self, worker_id: str) -> bool:
        """Whether a snapshot of the worker, and nothing less, would bring Redis up to date."""
        return self.attached and worker_id in self._refused

    def add(self, change: BlockChange) -> None:
        """A change that was applied: it follows the last one, or it is a snapshot, or the worker's end."""
        worker_id, epoch, sequence_number = change.worker_id, change.epoch, change.sequence_number
        if change.gone:
            self.forget(worker_id, epoch=epoch)
            return
        if change.snapshot:
            self._refused.discard(worker_id)
            self._put(Batch(worker_id=worker_id, epoch=epoch, follows=None, sequence_number=sequence_number, stored=set(change.stored)))
            return
        batch = self._waiting.get(worker_id)
        if batch is None:
            batch = Batch(worker_id=worker_id, epoch=epoch, follows=sequence_number - 1, sequence_number=sequence_number)
            self._put(batch)
        batch.sequence_number = sequence_number
        batch.stored.difference_update(change.removed)
        batch.removed.update(change.removed)
        batch.stored.update(change.stored)

    def renew(self, worker_id: str, *, epoch: int, sequence_number: int) -> None:
        """A sign of life: the lease in Redis is renewed, if Redis still has what it should."""
        if worker_id not in self._waiting:
            self._put(Batch(worker_id=worker_id, epoch=epoch, follows=sequence_number, sequence_number=sequence_number))

    def forget(self, worker_id: str, *, epoch: int) -> None:
        """The worker has left."""
        self._refused.discard(worker_id)
        self._put(Batch(worker_id=worker_id, epoch=epoch, follows=None, sequence_number=0, gone=True))

    async def wait_pending(self) -> None:
        """Returns when there may be something to write."""
        await self._pending.wait()

    def take_nowait(self, max_hashes: int) -> Sequence[Batch]:
        """The oldest batches, of about `max_hashes` together, to be written now."""
        taken: list[Batch] = []
        num_hashes = 0
        while self._waiting and num_hashes < max_hashes:
            batch = self._waiting.pop(next(iter(self._waiting)))
            num_hashes += len(batch.stored) + len(batch.removed) + 1
            taken.append(batch)
        if not self._waiting:
            self._pending.clear()
        return taken

    def refuse(self, batch: Batch) -> None:
        """Redis does not have what the batch follows."""
        newer = self._waiting.get(batch.worker_id)
        if newer is None or newer.follows is not None:
            self._refused.add(batch.worker_id)

    def attach(self) -> None:
        """Redis is there, with whatever it has."""
        self.attached = True

    def detach(self) -> None:
        """Redis is away."""
        self.attached = False
        self._waiting.clear()
        self._pending.clear()

    def _put(self, batch: Batch) -> None:
        if self.attached and batch.worker_id not in self._refused:
            self._waiting[batch.worker_id] = batch
            self._pending.set()
