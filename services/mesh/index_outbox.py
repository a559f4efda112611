"""What a worker still has to tell the KV index: changes merged until they are sent, kept until they are acknowledged. Pure; no network.

    held        all that the worker holds: the truth that a snapshot tells
    changed     the difference between held and what the events numbered so far tell
    unanswered  events that were numbered and are not acknowledged; the first `_num_sent` of them are sent on the present stream

Memory is bounded by the worker's own pool: whoever is too far behind drops the changes and tells a snapshot instead.
"""

from collections import deque
from collections.abc import Iterable

from protos.baton.v1 import common_pb2, kv_index_pb2
from services.mesh.block_events import MAX_EVENT_HASHES, snapshot_events

MAX_UNANSWERED = 64
_MAX_CHANGED = 1 << 16


class IndexOutbox:
    """Numbers and orders one worker's events. The first one is a snapshot."""

    def __init__(self, *, worker_id: str, epoch: int) -> None:
        self._worker = common_pb2.WorkerId(worker_id=worker_id, epoch=epoch)
        self._held: set[bytes] = set()
        self._stored: set[bytes] = set()
        self._removed: set[bytes] = set()
        self._snapshot_due = True
        self._snapshot_rest: deque[kv_index_pb2.BlockEvent] = deque()  # numbered, not yet unanswered
        self._unanswered: deque[kv_index_pb2.BlockEvent] = deque()
        self._num_sent = 0
        self._sequence_number = 0

    @property
    def all_acknowledged(self) -> bool:
        """Whether the index has everything."""
        return not (self._snapshot_due or self._snapshot_rest or self._unanswered or self._stored or self._removed)

    def change(self, *, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Takes a change of what the worker holds: `removed` first, then `stored`."""
        for block_hash in removed:
            if block_hash in self._held:
                self._held.discard(block_hash)
                if block_hash in self._stored:
                    self._stored.discard(block_hash)
                else:
                    self._removed.add(block_hash)
        for block_hash in stored:
            if block_hash not in self._held:
                self._held.add(block_hash)
                if block_hash in self._removed:
                    self._removed.discard(block_hash)
                else:
                    self._stored.add(block_hash)
        if self._snapshot_due or len(self._stored) + len(self._removed) > _MAX_CHANGED:
            self.need_snapshot()

    def need_snapshot(self) -> None:
        """The index has lost something: nothing but all that is held will do."""
        self._snapshot_due = True
        self._stored.clear()
        self._removed.clear()
        self._snapshot_rest.clear()
        self._unanswered.clear()
        self._num_sent = 0

    def acknowledge(self, sequence_number: int) -> None:
        """Everything up to `sequence_number` need not be sent again."""
        while self._unanswered and self._unanswered[0].sequence_number <= sequence_number:
            self._unanswered.popleft()
            self._num_sent = max(0, self._num_sent - 1)

    def rewind(self) -> None:
        """A new stream begins: what is not acknowledged is sent again."""
        self._num_sent = 0

    def next_event(self) -> kv_index_pb2.BlockEvent | None:
        """The next event to send; None: nothing to say, or too much of it unanswered."""
        if self._num_sent == len(self._unanswered):
            if len(self._unanswered) >= MAX_UNANSWERED:
                return None
            event = self._number_next()
            if event is None:
                return None
            self._unanswered.append(event)
        event = self._unanswered[self._num_sent]
        self._num_sent += 1
        return event

    def heartbeat(self) -> kv_index_pb2.BlockEvent:
        """An event that changes nothing: it asks whether the index has all that was sent. Only after next_event() has given None."""
        assert self._sequence_number > 0
        number = self._unanswered[-1].sequence_number if self._unanswered else self._sequence_number
        return kv_index_pb2.BlockEvent(worker=self._worker, sequence_number=number)

    def farewell(self) -> kv_index_pb2.BlockEvent:
        """The last event: the worker leaves."""
        self._sequence_number += 1
        return kv_index_pb2.BlockEvent(worker=self._worker, sequence_number=self._sequence_number, gone=True)

    def _number_next(self) -> kv_index_pb2.BlockEvent | None:
        if self._snapshot_due:
            self._snapshot_due = False
            self._snapshot_rest.extend(snapshot_events(self._worker, self._sequence_number + 1, self._held))
            self._sequence_number += len(self._snapshot_rest)
        if self._snapshot_rest:
            return self._snapshot_rest.popleft()
        removed = _take(self._removed, MAX_EVENT_HASHES)
        stored = _take(self._stored, MAX_EVENT_HASHES - len(removed))
        if not removed and not stored:
            return None
        self._sequence_number += 1
        return kv_index_pb2.BlockEvent(
            worker=self._worker, sequence_number=self._sequence_number, removed=b"".join(removed), stored=b"".join(stored)
        )


def _take(hashes: set[bytes], most: int) -> list[bytes]:
    if len(hashes) <= most:
        taken = list(hashes)
        hashes.clear()
        return taken
    return [hashes.pop() for _ in range(most)]
