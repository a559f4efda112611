"""The outbox: whatever is lost, repeated or cut off, what the index has been told in the end is what the worker holds."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from protos.baton.v1 import kv_index_pb2
from services.core.prefix_index import PrefixIndex
from services.mesh.block_events import MAX_EVENT_HASHES, BlockChange, change_from_proto
from services.mesh.index_outbox import MAX_UNANSWERED, IndexOutbox

HASHES = [number.to_bytes(16, "big") for number in range(3 * MAX_EVENT_HASHES)]
few = st.lists(st.sampled_from(HASHES[:8]), max_size=4)


class Listener:
    """The index as the proto describes it: applies what follows, acknowledges, asks for a snapshot after a gap."""

    def __init__(self, outbox: IndexOutbox) -> None:
        self.index = PrefixIndex()
        self._outbox = outbox

    def hear(self, event: kv_index_pb2.BlockEvent, *, answer_arrives: bool = True) -> None:
        change = change_from_proto(event)
        position = self.index.position("w")
        if position is None or change.sequence_number > position[1]:
            if change.snapshot:
                self.index.replace("w", epoch=change.epoch, sequence_number=change.sequence_number, hashes=change.stored)
            elif not self._apply(change):
                if answer_arrives:
                    self._outbox.need_snapshot()
                return
        if answer_arrives:
            self._outbox.acknowledge(change.sequence_number)

    def _apply(self, change: BlockChange) -> bool:
        return bool(change.stored or change.removed) and self.index.apply(
            "w", epoch=change.epoch, sequence_number=change.sequence_number, stored=change.stored, removed=change.removed
        )


def drain(outbox: IndexOutbox) -> list[kv_index_pb2.BlockEvent]:
    events = []
    while (event := outbox.next_event()) is not None:
        events.append(event)
    return events


def make_outbox() -> IndexOutbox:
    return IndexOutbox(worker_id="w", epoch=7)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("change"), few, few),
        st.tuples(st.sampled_from(["send", "lose", "answer lost", "rewind", "forgotten"]), st.just([]), st.just([])),
    ),
    max_size=30,
)


@given(steps)
def test_outbox_when_events_and_answers_are_lost_then_the_index_learns_what_is_held(
    plan: list[tuple[str, list[bytes], list[bytes]]],
) -> None:
    outbox = make_outbox()
    listener = Listener(outbox)
    held: set[bytes] = set()
    for name, stored, removed in plan:
        if name == "change":
            outbox.change(stored=stored, removed=removed)
            held = (held - set(removed)) | set(stored)
        elif name == "rewind":
            outbox.rewind()
        elif name == "forgotten":
            listener.index.forget("w")
        elif (event := outbox.next_event()) is not None and name != "lose":
            listener.hear(event, answer_arrives=name == "send")
    settle(outbox, listener)
    assert listener.index.hashes("w") == held
    assert outbox.all_acknowledged


def settle(outbox: IndexOutbox, listener: Listener) -> None:
    outbox.rewind()
    for _ in range(4):
        for event in drain(outbox):
            listener.hear(event)
        listener.hear(outbox.heartbeat())


def test_first_event_when_nothing_is_held_then_it_is_an_empty_snapshot_with_number_one() -> None:
    [event] = drain(make_outbox())
    assert (event.snapshot, event.sequence_number, event.stored, event.worker.epoch) == (True, 1, b"", 7)


def test_changes_when_they_cancel_out_before_they_are_sent_then_nothing_is_sent() -> None:
    outbox = make_outbox()
    outbox.change(stored=HASHES[:2], removed=[])
    drain(outbox)
    outbox.change(stored=HASHES[2:3], removed=HASHES[:1])
    outbox.change(stored=HASHES[:1], removed=HASHES[2:3])
    assert drain(outbox) == []


def test_next_event_when_too_much_is_unanswered_then_waits_and_merges_until_an_answer_comes() -> None:
    outbox = make_outbox()
    drain(outbox)
    for number in range(2 * MAX_UNANSWERED):
        outbox.change(stored=HASHES[number : number + 1], removed=[])
        outbox.next_event()
    assert outbox.next_event() is None
    outbox.acknowledge(1)
    [merged] = drain(outbox)
    assert merged.sequence_number == MAX_UNANSWERED + 1
    assert len(merged.stored) == 16 * (MAX_UNANSWERED + 1)


def test_snapshot_when_it_has_more_than_one_event_may_then_it_goes_on_in_the_following_ones() -> None:
    outbox = make_outbox()
    outbox.change(stored=HASHES[: 2 * MAX_EVENT_HASHES + 1], removed=[])
    events = drain(outbox)
    assert [(event.snapshot, event.sequence_number, len(event.stored) // 16) for event in events] == [
        (True, 1, MAX_EVENT_HASHES),
        (False, 2, MAX_EVENT_HASHES),
        (False, 3, 1),
    ]
    listener = Listener(outbox)
    for event in events:
        listener.hear(event)
    assert listener.index.hashes("w") == set(HASHES[: 2 * MAX_EVENT_HASHES + 1])


def test_need_snapshot_when_a_snapshot_is_half_sent_then_it_begins_anew() -> None:
    outbox = make_outbox()
    outbox.change(stored=HASHES[: MAX_EVENT_HASHES + 1], removed=[])
    first = outbox.next_event()
    assert first is not None and first.snapshot
    outbox.need_snapshot()
    again = drain(outbox)
    assert [event.snapshot for event in again] == [True, False]
    assert again[0].sequence_number == 3
    assert held_by(again) == set(HASHES[: MAX_EVENT_HASHES + 1])


def test_change_when_the_index_is_away_for_long_then_a_snapshot_takes_the_place_of_the_changes() -> None:
    outbox = make_outbox()
    drain(outbox)
    outbox.acknowledge(1)
    for start in range(0, 1 << 17, 1024):
        hashes = [number.to_bytes(16, "big") for number in range(start, start + 1024)]
        outbox.change(stored=hashes, removed=[])
        outbox.change(stored=[], removed=hashes[1:])
    outbox.change(stored=[number.to_bytes(16, "big") for number in range(1 << 20, (1 << 20) + (1 << 16))], removed=[])
    events = drain(outbox)
    assert events[0].snapshot
    assert len(held_by(events)) == 128 + (1 << 16)


def held_by(events: Sequence[kv_index_pb2.BlockEvent]) -> set[bytes]:
    return {block_hash for event in events for block_hash in change_from_proto(event).stored}
