"""The journal: what it gives to be written makes of Redis what the worker holds, or it says that only a snapshot will do."""

from hypothesis import given
from hypothesis import strategies as st

from services.kv_index.journal import Batch, Journal
from services.mesh.block_events import BlockChange

HASHES = [bytes([number]) * 16 for number in range(8)]
few = st.lists(st.sampled_from(HASHES), max_size=4)


def change(
    number: int, *, stored: list[bytes] | None = None, removed: list[bytes] | None = None, snapshot: bool = False, gone: bool = False
) -> BlockChange:
    return BlockChange(
        worker_id="w", epoch=5, sequence_number=number, snapshot=snapshot, gone=gone, removed=removed or [], stored=stored or []
    )


def attached() -> Journal:
    journal = Journal()
    journal.attach()
    return journal


class FakeRedis:
    """What the write script does, in Python."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.hashes: set[bytes] = set()

    def write(self, batch: Batch) -> bool:
        if batch.gone:
            self.lose()
            return True
        if batch.follows is None:
            self.hashes = set()
        elif batch.follows != self.number:
            return False
        self.hashes = (self.hashes - batch.removed) | batch.stored
        self.number = batch.sequence_number
        return True

    def lose(self) -> None:
        self.number, self.hashes = None, set()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("change"), few, few),
        st.tuples(st.sampled_from(["snapshot", "heartbeat", "take", "written", "away", "back", "flushed"]), st.just([]), st.just([])),
    ),
    max_size=40,
)


@given(steps)
def test_journal_when_redis_comes_goes_and_loses_data_then_it_has_what_is_held_or_a_snapshot_is_asked_for(
    plan: list[tuple[str, list[bytes], list[bytes]]],
) -> None:
    journal, redis = attached(), FakeRedis()
    held: set[bytes] = set()
    number = 1
    journal.add(change(1, snapshot=True))
    writing: list[Batch] = []

    def write() -> None:
        for batch in writing:
            if not redis.write(batch):
                journal.refuse(batch)
        writing.clear()

    for name, stored, removed in [
        *plan,
        ("back", [], []),
        ("written", [], []),
        ("heartbeat", [], []),
        ("take", [], []),
        ("written", [], []),
    ]:
        if name == "change":
            number += 1
            held = (held - set(removed)) | set(stored)
            journal.add(change(number, stored=stored, removed=removed))
        elif name == "snapshot":
            number += 1
            journal.add(change(number, snapshot=True, stored=list(held)))
        elif name == "heartbeat":
            journal.renew("w", epoch=5, sequence_number=number)
        elif name == "take" and not writing:
            writing.extend(journal.take_nowait(1000))
        elif name == "written" and writing:
            write()
        elif name == "away":
            journal.detach()
            writing.clear()
        elif name == "back":
            journal.attach()
        elif name == "flushed":
            redis.lose()
    assert journal.needs_snapshot("w") or (redis.number, redis.hashes) == (number, held)
    journal.add(change(number + 1, snapshot=True, stored=list(held)))
    writing.extend(journal.take_nowait(1000))
    write()
    assert not journal.needs_snapshot("w")
    assert (redis.number, redis.hashes) == (number + 1, held)


def test_take_nowait_when_a_worker_changed_often_then_gives_one_batch_of_what_is_left() -> None:
    journal = attached()
    journal.add(change(4, stored=HASHES[:3]))
    journal.add(change(5, removed=HASHES[:1], stored=HASHES[3:4]))
    [batch] = journal.take_nowait(1000)
    assert (batch.follows, batch.sequence_number) == (3, 5)
    assert (batch.stored, batch.removed) == (set(HASHES[1:4]), {HASHES[0]})
    assert journal.take_nowait(1000) == []


def test_refuse_when_a_snapshot_waits_then_none_is_asked_for() -> None:
    journal = attached()
    journal.add(change(4, stored=HASHES[:1]))
    [refused] = journal.take_nowait(1000)
    journal.add(change(5, snapshot=True))
    journal.refuse(refused)
    assert not journal.needs_snapshot("w")
    assert [batch.follows for batch in journal.take_nowait(1000)] == [None]


def test_take_nowait_when_there_is_more_than_fits_then_the_oldest_come_first() -> None:
    journal = attached()
    for number in range(5):
        journal.add(
            BlockChange(worker_id=f"w{number}", epoch=1, sequence_number=1, snapshot=True, gone=False, removed=[], stored=HASHES[:4])
        )
    first = journal.take_nowait(10)
    assert [batch.worker_id for batch in [*first, *journal.take_nowait(1000)]] == [f"w{number}" for number in range(5)]
    assert len(first) == 2


def test_forget_when_the_worker_left_while_redis_was_away_then_nothing_is_asked_of_it() -> None:
    journal = attached()
    journal.add(change(1, snapshot=True))
    journal.detach()
    journal.add(change(2, gone=True))
    journal.attach()
    assert not journal.needs_snapshot("w")
    assert journal.take_nowait(1000) == []
