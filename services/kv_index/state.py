"""What the service believes: every worker's blocks, and who has been silent for how long. Pure; knows nothing of streams or of Redis."""

import enum
from collections.abc import Iterable

from protos.baton.v1 import common_pb2, kv_index_pb2
from services.core.prefix_index import PrefixIndex
from services.mesh.block_events import BlockChange, snapshot_events, snapshot_parts


class Verdict(enum.Enum):
    """What an event meant."""

    APPLIED = enum.auto()
    REPEATED = enum.auto()  # known already: a heartbeat, or sent again after a broken stream
    GAP = enum.auto()  # events are missing before it: only a snapshot helps
    STALE = enum.auto()  # of an earlier start of the worker


class IndexState:
    """Leases are counted in ticks, so that a service that was frozen itself does not take its workers for silent."""

    def __init__(self, *, lease_ticks: int) -> None:
        self.index = PrefixIndex()
        self._lease_ticks = lease_ticks
        self._silent_ticks: dict[str, int] = {}

    def offer(self, change: BlockChange) -> Verdict:
        """Applies a change that follows what is known, or is a snapshot."""
        worker_id, epoch, sequence_number = change.worker_id, change.epoch, change.sequence_number
        known_epoch, known_number = self.index.position(worker_id) or (0, 0)
        if epoch < known_epoch:
            return Verdict.STALE
        if change.gone:
            self._forget(worker_id)
            return Verdict.APPLIED
        if epoch == known_epoch and worker_id in self.index:
            self._silent_ticks[worker_id] = 0
            if sequence_number <= known_number:
                return Verdict.REPEATED
        if change.snapshot:
            self.load(worker_id, epoch=epoch, sequence_number=sequence_number, hashes=change.stored)
            return Verdict.APPLIED
        if not change.stored and not change.removed:
            return Verdict.GAP  # a heartbeat after an event that never came
        follows = self.index.apply(worker_id, epoch=epoch, sequence_number=sequence_number, stored=change.stored, removed=change.removed)
        return Verdict.APPLIED if follows else Verdict.GAP

    def load(self, worker_id: str, *, epoch: int, sequence_number: int, hashes: Iterable[bytes]) -> None:
        """Takes all of a worker's blocks, with a new lease."""
        self.index.replace(worker_id, epoch=epoch, sequence_number=sequence_number, hashes=hashes)
        self._silent_ticks[worker_id] = 0

    def snapshot(self, worker_id: str) -> list[kv_index_pb2.BlockEvent]:
        """The worker's blocks as events, the last of which has the number of the last one applied."""
        position = self.index.position(worker_id)
        assert position is not None
        epoch, sequence_number = position
        hashes = self.index.hashes(worker_id)
        # It took at least as many events to store these blocks, numbered from 1: the first number is positive.
        first = sequence_number - snapshot_parts(len(hashes)) + 1
        assert first > 0
        return snapshot_events(common_pb2.WorkerId(worker_id=worker_id, epoch=epoch), first, hashes)

    def tick(self) -> list[kv_index_pb2.BlockEvent]:
        """One step of time. Forgets workers whose lease has run out and returns an event `gone` for each."""
        for worker_id in self._silent_ticks:
            self._silent_ticks[worker_id] += 1
        gone = []
        for worker_id in [worker_id for worker_id, ticks in self._silent_ticks.items() if ticks > self._lease_ticks]:
            position = self.index.position(worker_id)
            assert position is not None
            worker = common_pb2.WorkerId(worker_id=worker_id, epoch=position[0])
            gone.append(kv_index_pb2.BlockEvent(worker=worker, sequence_number=position[1], gone=True))
            self._forget(worker_id)
        return gone

    def _forget(self, worker_id: str) -> None:
        self.index.forget(worker_id)
        self._silent_ticks.pop(worker_id, None)
