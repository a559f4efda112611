"""The prefix index against sets: whatever the events, every look-up says what a list of each worker's blocks would."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.prefix_index import STRIDE, PrefixIndex

HASHES = [bytes([number]) * 16 for number in range(6)]
WORKERS = ["w0", "w1", "w2", "w3"]

some_hashes = st.lists(st.sampled_from(HASHES), max_size=5)
worker_ids = st.sampled_from(WORKERS)
operations = st.one_of(
    st.tuples(st.just("replace"), worker_ids, st.integers(1, 2), st.integers(1, 3), some_hashes, some_hashes),
    st.tuples(st.just("apply"), worker_ids, st.integers(-1, 1), st.integers(-1, 2), some_hashes, some_hashes),
    st.tuples(st.just("disown"), worker_ids, st.just(0), st.just(0), some_hashes, some_hashes),
    st.tuples(st.just("forget"), worker_ids, st.just(0), st.just(0), some_hashes, some_hashes),
)


@dataclass
class Model:
    epoch: int
    sequence_number: int
    hashes: set[bytes] = field(default_factory=set)


@given(st.lists(operations, max_size=25), st.lists(some_hashes, min_size=1, max_size=4))
def test_index_when_any_events_come_then_it_equals_the_sets_of_a_naive_model(
    steps: list[tuple[str, str, int, int, list[bytes], list[bytes]]], prompts: list[list[bytes]]
) -> None:
    index, model = PrefixIndex(), dict[str, Model]()
    for name, worker_id, epoch, number, stored, removed in steps:
        known = model.get(worker_id)
        if name == "replace":
            index.replace(worker_id, epoch=epoch, sequence_number=number, hashes=stored)
            model[worker_id] = Model(epoch, number, set(stored))
        elif name == "apply":
            # `epoch` and `number` are offsets here, so that about every sixth event follows.
            base = known or Model(0, 0)
            at = {"epoch": base.epoch + epoch, "sequence_number": base.sequence_number + number}
            follows = known is not None and (epoch, number) == (0, 1)
            assert index.apply(worker_id, **at, stored=stored, removed=removed) is follows
            if follows:
                assert known is not None
                known.hashes = (known.hashes - set(removed)) | set(stored)
                known.sequence_number += 1
        elif name == "disown":
            index.disown(worker_id, removed)
            if known is not None:
                known.hashes -= set(removed)
        else:
            index.forget(worker_id)
            model.pop(worker_id, None)
        check(index, model, prompts)


def check(index: PrefixIndex, model: dict[str, Model], prompts: list[list[bytes]]) -> None:
    for worker_id in WORKERS:
        known = model.get(worker_id)
        assert (worker_id in index) == (known is not None)
        assert index.position(worker_id) == (None if known is None else (known.epoch, known.sequence_number))
        assert index.hashes(worker_id) == (set() if known is None else known.hashes)
    assert sorted(filter(None, index.worker_ids)) == sorted(model)
    assert set(index._holders) == set().union(*(known.hashes for known in model.values())), "memory of blocks that nobody holds"
    assert index.num_entries == sum(len(known.hashes) for known in model.values())
    for prompt in prompts:
        found = {worker_id: match.num_blocks for match in index.match(prompt) for worker_id in index.workers_in(match.workers)}
        assert set(found) == {worker_id for worker_id, known in model.items() if leading(prompt, known.hashes)}
        for worker_id, length in found.items():
            held = [block_hash in model[worker_id].hashes for block_hash in prompt]
            assert held[length - 1]
            assert length == len(prompt) or not held[length]
            if held == sorted(held, reverse=True):  # no block without those before it
                assert length == leading(prompt, model[worker_id].hashes)
        lengths = [match.num_blocks for match in index.match(prompt)]
        assert lengths == sorted(set(lengths))


def leading(prompt: list[bytes], held: set[bytes]) -> int:
    return next((number for number, block_hash in enumerate(prompt) if block_hash not in held), len(prompt))


def test_match_when_workers_hold_different_lengths_then_each_is_in_one_run() -> None:
    index = PrefixIndex()
    for worker_id, length in [("long", 4), ("short", 2), ("none", 0), ("also short", 2)]:
        index.replace(worker_id, epoch=1, sequence_number=1, hashes=HASHES[:length])
    runs = [(match.num_blocks, set(index.workers_in(match.workers))) for match in index.match(HASHES[:5])]
    assert runs == [(2, {"short", "also short"}), (4, {"long"})]


@given(st.integers(1, 3 * STRIDE + 1), st.lists(st.integers(0, 3 * STRIDE + 1), max_size=8))
def test_match_when_prompts_are_long_then_every_workers_prefix_is_exact(num_blocks: int, held: list[int]) -> None:
    index, chain = PrefixIndex(), [number.to_bytes(16, "big") for number in range(3 * STRIDE + 1)]
    for number, length in enumerate(held):
        index.replace(f"w{number}", epoch=1, sequence_number=1, hashes=chain[:length])
    matches = index.match(chain[:num_blocks])
    found = {worker_id: match.num_blocks for match in matches for worker_id in index.workers_in(match.workers)}
    assert found == {f"w{number}": min(length, num_blocks) for number, length in enumerate(held) if length}
    assert [match.num_blocks for match in matches] == sorted(set(found.values()))


def test_match_when_a_worker_holds_later_blocks_only_then_it_is_left_out() -> None:
    index = PrefixIndex()
    index.replace("w", epoch=1, sequence_number=1, hashes=HASHES[1:])
    assert index.match(HASHES) == []


@pytest.mark.parametrize("at", [(1, 1), (1, 3), (2, 2), (0, 2)])
def test_apply_when_the_event_does_not_follow_then_nothing_changes(at: tuple[int, int]) -> None:
    index = PrefixIndex()
    index.replace("w", epoch=1, sequence_number=1, hashes=HASHES[:2])
    assert not index.apply("w", epoch=at[0], sequence_number=at[1], stored=HASHES[2:], removed=HASHES[:1])
    assert index.position("w") == (1, 1)
    assert index.hashes("w") == set(HASHES[:2])


def test_apply_when_a_block_is_removed_and_stored_then_it_is_held() -> None:
    index = PrefixIndex()
    index.replace("w", epoch=1, sequence_number=1, hashes=[])
    index.apply("w", epoch=1, sequence_number=2, stored=HASHES[:1], removed=HASHES[:1])
    assert index.hashes("w") == {HASHES[0]}


def test_forget_when_another_worker_comes_then_it_takes_the_free_slot_with_nothing_in_it() -> None:
    index = PrefixIndex()
    for number, worker_id in enumerate(["a", "b", "c"]):
        index.replace(worker_id, epoch=1, sequence_number=1, hashes=HASHES[: number + 1])
    index.forget("b")
    assert index.worker_ids == ["a", None, "c"]
    index.replace("d", epoch=1, sequence_number=1, hashes=[])
    assert index.worker_ids == ["a", "d", "c"]
    assert [set(index.workers_in(match.workers)) for match in index.match(HASHES)] == [{"a"}, {"c"}]
