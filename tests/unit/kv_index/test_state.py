"""What the service believes: verdicts on events, leases, snapshots for watchers."""

import contextlib

import hypothesis.strategies as st
import pytest
from hypothesis import given

from protos.baton.v1 import common_pb2, kv_index_pb2
from services.core.errors import InvalidRequest
from services.core.prefix_index import PrefixIndex
from services.kv_index.state import IndexState, Verdict
from services.mesh.block_events import MAX_EVENT_HASHES, BlockChange, change_from_proto

HASHES = [number.to_bytes(16, "big") for number in range(MAX_EVENT_HASHES + 1)]


def change(
    number: int,
    *,
    stored: list[bytes] | None = None,
    removed: list[bytes] | None = None,
    epoch: int = 5,
    snapshot: bool = False,
    gone: bool = False,
) -> BlockChange:
    return BlockChange(
        worker_id="w", epoch=epoch, sequence_number=number, snapshot=snapshot, gone=gone, removed=removed or [], stored=stored or []
    )


def known_state(lease_ticks: int = 3) -> IndexState:
    """Knows worker w in epoch 5 at number 2, with two blocks."""
    state = IndexState(lease_ticks=lease_ticks)
    assert state.offer(change(1, snapshot=True, stored=HASHES[:1])) is Verdict.APPLIED
    assert state.offer(change(2, stored=HASHES[1:2])) is Verdict.APPLIED
    return state


@pytest.mark.parametrize(
    ("offered", "verdict", "held"),
    [
        (change(3, stored=HASHES[2:3], removed=HASHES[:1]), Verdict.APPLIED, HASHES[1:3]),
        (change(2), Verdict.REPEATED, HASHES[:2]),
        (change(3), Verdict.GAP, HASHES[:2]),
        (change(1, snapshot=True), Verdict.REPEATED, HASHES[:2]),
        (change(4, stored=HASHES[2:3]), Verdict.GAP, HASHES[:2]),
        (change(9, snapshot=True, stored=HASHES[2:3]), Verdict.APPLIED, HASHES[2:3]),
        (change(3, epoch=4, stored=HASHES[2:3]), Verdict.STALE, HASHES[:2]),
        (change(9, epoch=4, snapshot=True), Verdict.STALE, HASHES[:2]),
        (change(9, epoch=4, gone=True), Verdict.STALE, HASHES[:2]),
        (change(3, epoch=6, stored=HASHES[2:3]), Verdict.GAP, HASHES[:2]),
        (change(1, epoch=6, snapshot=True, stored=HASHES[2:3]), Verdict.APPLIED, HASHES[2:3]),
        (change(3, gone=True), Verdict.APPLIED, []),
    ],
)
def test_offer_when_an_event_comes_then_it_is_applied_repeated_a_gap_or_stale(
    offered: BlockChange, verdict: Verdict, held: list[bytes]
) -> None:
    state = known_state()
    assert state.offer(offered) is verdict
    assert state.index.hashes("w") == set(held)


def test_offer_when_the_worker_is_unknown_then_only_a_snapshot_counts() -> None:
    state = IndexState(lease_ticks=3)
    for unknown in (change(1, stored=HASHES[:1]), change(0, epoch=0)):
        assert state.offer(unknown) is Verdict.GAP
    assert "w" not in state.index


def test_tick_when_a_worker_is_silent_for_its_lease_then_it_is_gone_once() -> None:
    state = known_state(lease_ticks=3)
    assert [state.tick() for _ in range(3)] == [[], [], []]
    [gone] = state.tick()
    assert (gone.worker.worker_id, gone.worker.epoch, gone.gone) == ("w", 5, True)
    assert "w" not in state.index
    assert state.tick() == []


@pytest.mark.parametrize("sign_of_life", [change(2), change(3), change(9), change(9, snapshot=True)])
def test_tick_when_a_worker_gave_any_sign_of_life_then_its_lease_begins_anew(sign_of_life: BlockChange) -> None:
    state = known_state(lease_ticks=1)
    assert state.tick() == []
    state.offer(sign_of_life)
    assert state.tick() == []
    assert len(state.tick()) == 1


def test_snapshot_when_it_needs_several_events_then_a_replica_ends_at_the_last_number() -> None:
    state = IndexState(lease_ticks=3)
    state.offer(change(1, snapshot=True, stored=HASHES[:MAX_EVENT_HASHES]))
    state.offer(change(2, stored=HASHES[MAX_EVENT_HASHES:]))
    events = state.snapshot("w")
    assert [(event.snapshot, event.sequence_number) for event in events] == [(True, 1), (False, 2)]
    replica = PrefixIndex()
    first, second = map(change_from_proto, events)
    replica.replace("w", epoch=5, sequence_number=first.sequence_number, hashes=first.stored)
    assert replica.apply("w", epoch=5, sequence_number=second.sequence_number, stored=second.stored, removed=second.removed)
    assert replica.hashes("w") == set(HASHES)
    assert replica.position("w") == state.index.position("w")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sequence_number": 1}, "event.worker.worker_id"),
        ({"worker": common_pb2.WorkerId(worker_id="w")}, "event.sequence_number"),
        ({"worker": common_pb2.WorkerId(worker_id="w"), "sequence_number": 1, "stored": b"x" * 17}, "event.stored"),
        ({"worker": common_pb2.WorkerId(worker_id="w"), "sequence_number": 1, "removed": b"x" * 15}, "event.removed"),
        ({"worker": common_pb2.WorkerId(worker_id="w"), "sequence_number": 1, "stored": b"x" * 16 * (MAX_EVENT_HASHES + 1)}, "event"),
        ({"worker": common_pb2.WorkerId(worker_id="w"), "sequence_number": 1, "snapshot": True, "removed": b"x" * 16}, "event.removed"),
    ],
)
def test_change_from_proto_when_an_event_is_malformed_then_names_the_field(fields: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        change_from_proto(kv_index_pb2.BlockEvent(**fields))  # type: ignore[arg-type]
    assert caught.value.field == named


NUMBERS = st.integers(0, 4) | st.integers(0, 2**64 - 1)
PACKED = st.lists(st.sampled_from(HASHES[:4]), max_size=4).map(b"".join) | st.binary(max_size=40)
EVENTS = st.builds(
    kv_index_pb2.BlockEvent,
    worker=st.builds(common_pb2.WorkerId, worker_id=st.sampled_from(["w", "v", ""]) | st.text(max_size=300), epoch=NUMBERS),
    sequence_number=NUMBERS,
    snapshot=st.booleans(),
    removed=PACKED,
    stored=PACKED,
    gone=st.booleans(),
)


@given(st.lists(EVENTS, max_size=12))
def test_state_when_events_are_anything_holds_what_its_snapshots_tell(events: list[kv_index_pb2.BlockEvent]) -> None:
    state = IndexState(lease_ticks=3)
    for event in events:
        with contextlib.suppress(InvalidRequest):
            state.offer(change_from_proto(event))
        for worker_id in ("w", "v"):
            if worker_id in state.index:
                told = PrefixIndex()
                for change in map(change_from_proto, state.snapshot(worker_id)):
                    if change.snapshot:
                        told.replace(worker_id, epoch=change.epoch, sequence_number=change.sequence_number, hashes=change.stored)
                assert (told.position(worker_id), told.hashes(worker_id)) == (
                    state.index.position(worker_id),
                    state.index.hashes(worker_id),
                )
    for _ in range(4):
        state.tick()
    assert state.index.num_entries == 0
    assert not any(state.index.worker_ids)
