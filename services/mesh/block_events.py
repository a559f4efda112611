"""The events in which workers tell the KV index what they hold: as values, and as messages. Shared by who sends and who takes them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from protos.baton.v1 import common_pb2, kv_index_pb2
from services.core.errors import InvalidRequest
from services.core.prefix_hash import HASH_BYTES
from services.mesh.convert import hashes_from_bytes

# Stored and removed hashes together. Applying that many takes an event loop a few milliseconds.
MAX_EVENT_HASHES = 4096
MAX_WORKER_ID_CHARACTERS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChange:
    """A BlockEvent, read. `removed` goes before `stored`; in a snapshot `stored` is all that the worker holds."""

    worker_id: str
    epoch: int
    sequence_number: int
    snapshot: bool
    gone: bool
    removed: Sequence[bytes]
    stored: Sequence[bytes]


def change_from_proto(event: kv_index_pb2.BlockEvent) -> BlockChange:
    """Raises InvalidRequest naming the first field that is malformed."""
    length = len(event.worker.worker_id)
    if not 0 < length <= MAX_WORKER_ID_CHARACTERS:
        raise InvalidRequest(
            "event.worker.worker_id", f"has {length} characters, not 1 … {MAX_WORKER_ID_CHARACTERS}", limit=MAX_WORKER_ID_CHARACTERS
        )
    if event.sequence_number == 0:
        raise InvalidRequest("event.sequence_number", "is 0; the first event has 1", limit=1)
    num_hashes = (len(event.stored) + len(event.removed)) // HASH_BYTES
    if num_hashes > MAX_EVENT_HASHES:
        raise InvalidRequest("event", f"has {num_hashes} block hashes, more than {MAX_EVENT_HASHES}", limit=MAX_EVENT_HASHES)
    if event.snapshot and event.removed:
        raise InvalidRequest("event.removed", "must be empty in a snapshot")
    return BlockChange(
        worker_id=event.worker.worker_id,
        epoch=event.worker.epoch,
        sequence_number=event.sequence_number,
        snapshot=event.snapshot,
        gone=event.gone,
        removed=hashes_from_bytes(event.removed, "event.removed"),
        stored=hashes_from_bytes(event.stored, "event.stored"),
    )


def snapshot_parts(num_hashes: int) -> int:
    """Number of events that a snapshot of so many blocks takes."""
    return max(1, -(-num_hashes // MAX_EVENT_HASHES))


def snapshot_events(worker: common_pb2.WorkerId, first_sequence_number: int, hashes: Collection[bytes]) -> list[kv_index_pb2.BlockEvent]:
    """All that the worker holds: a snapshot of as many blocks as one event may have, and events that store the rest."""
    packed = b"".join(hashes)
    step = MAX_EVENT_HASHES * HASH_BYTES
    return [
        kv_index_pb2.BlockEvent(
            worker=worker, sequence_number=first_sequence_number + part, snapshot=part == 0, stored=packed[part * step : (part + 1) * step]
        )
        for part in range(snapshot_parts(len(hashes)))
    ]
