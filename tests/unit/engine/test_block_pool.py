"""BlockPool against a model: whatever the order of calls, every block is in one place and no block is handed out twice."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.core.errors import OutOfBlocks
from services.core.prefix_hash import ROOT, block_hash
from services.engine.block_pool import BlockPool


def content(name: int, parent: bytes = ROOT) -> bytes:
    """A hash that stands for block content number `name` after `parent`."""
    return block_hash(b"k", parent, bytes([name]))


def counts(pool: BlockPool) -> tuple[int, int, int, int]:
    return pool.num_free, pool.num_cached, pool.num_owned, pool.num_quarantined


class PoolMachine(RuleBasedStateMachine):
    """Tables of imaginary sequences over a pool, and what must be true of every block.

    free, cached, quarantined   where each block is; cached is in order of eviction
    tables                      who owns what: one list of block ids per sequence
    written                     hash of what an owned or cached block holds, named in the pool or not
    named                       hash → the block that answers for it
    replayed                    what somebody knows who applies all drained changes; None before they are tracked
    """

    @initialize(num_blocks=st.integers(1, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.free = set(range(num_blocks))
        self.cached: list[int] = []
        self.quarantined: set[int] = set()
        self.tables: list[list[int]] = []
        self.written: dict[int, bytes] = {}
        self.named: dict[bytes, int] = {}
        self.evictions = 0
        self.replayed: set[bytes] | None = None

    def holders(self, block_id: int) -> int:
        return sum(table.count(block_id) for table in self.tables)

    def is_named(self, block_id: int) -> bool:
        return self.named.get(self.written.get(block_id, b"")) == block_id

    def evict(self) -> None:
        block_id = self.cached.pop(0)
        del self.named[self.written.pop(block_id)]
        self.free.add(block_id)
        self.evictions += 1

    @rule(num_blocks=st.integers(0, 11))
    def allocate(self, num_blocks: int) -> None:
        available = len(self.free) + len(self.cached)
        before = counts(self.pool)
        assert self.pool.can_allocate(num_blocks) == (num_blocks <= available)
        if num_blocks > available:
            with pytest.raises(OutOfBlocks, match=f"^need {num_blocks} KV blocks, {available} free$"):
                self.pool.allocate(num_blocks)
            assert counts(self.pool) == before
            return
        blocks = self.pool.allocate(num_blocks)
        for block_id in blocks:  # which free one is the pool's choice; which cached one is not
            if not self.free:
                self.evict()
            self.free.remove(block_id)
        self.tables.append(blocks)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), name=st.integers(0, 3))
    def seal(self, data: st.DataObject, name: int) -> None:
        """Names the first block of a table that has no content yet, as a chain after the block before it."""
        unsealed = [(table, i) for table in self.tables for i, block_id in enumerate(table) if block_id not in self.written]
        unsealed = [(table, i) for table, i in unsealed if i == 0 or table[i - 1] in self.written]
        if not unsealed:
            return
        table, index = data.draw(st.sampled_from(unsealed))
        value = content(name, self.written[table[index - 1]] if index else ROOT)
        self.pool.seal(table[index], value)
        self.written[table[index]] = value
        self.named.setdefault(value, table[index])

    @rule(names=st.lists(st.integers(0, 3), min_size=1, max_size=4), extra=st.integers(0, 4))
    def admit(self, names: list[int], extra: int) -> None:
        """What a scheduler does with a prompt: match, ask, share, allocate."""
        chain: list[bytes] = []
        for name in names:
            chain.append(content(name, chain[-1] if chain else ROOT))
        before = counts(self.pool)
        matched = self.pool.match_prefix(chain)
        assert counts(self.pool) == before
        assert [self.written[block_id] for block_id in matched] == chain[: len(matched)]
        assert matched == [self.named[value] for value in chain[: len(matched)]]
        assert len(matched) == len(chain) or chain[len(matched)] not in self.named
        reachable = len(self.free) + len([block_id for block_id in self.cached if block_id not in matched])
        assert self.pool.can_allocate(extra, shared=matched) == (extra <= reachable)
        self.pool.share(matched)
        self.cached = [block_id for block_id in self.cached if block_id not in matched]
        self.tables.append(matched)
        self.allocate(extra)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block_id in reversed(table):  # the tail becomes the next to be evicted
            if self.holders(block_id):
                continue
            if self.is_named(block_id):
                self.cached.append(block_id)
            else:
                self.written.pop(block_id, None)
                self.free.add(block_id)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        possible = [block_id for block_id in table if self.holders(block_id) == 1 and not self.is_named(block_id)]
        chosen = data.draw(st.lists(st.sampled_from(possible), unique=True)) if possible else []
        self.pool.quarantine(chosen)
        table[:] = [block_id for block_id in table if block_id not in chosen]
        for block_id in chosen:
            self.written.pop(block_id, None)
        self.quarantined.update(chosen)

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def lift_quarantine(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.quarantined)), unique=True))
        self.pool.lift_quarantine(chosen)
        self.quarantined.difference_update(chosen)
        self.free.update(chosen)

    @rule()
    def track_changes(self) -> None:
        if self.replayed is None:
            self.pool.track_changes()
            self.replayed = set()

    @rule()
    def drain_changes(self) -> None:
        stored, removed = self.pool.drain_changes()
        if self.replayed is None:
            assert not stored + removed
            return
        assert len({*stored, *removed}) == len(stored) + len(removed)  # no hash twice, none in both
        assert self.replayed.isdisjoint(stored)
        assert self.replayed.issuperset(removed)
        self.replayed = (self.replayed - set(removed)) | set(stored)
        assert self.replayed == set(self.named)
        assert self.pool.drain_changes() == ([], [])

    @rule()
    def clear_cache(self) -> None:
        self.pool.clear_cache()
        while self.cached:
            self.evict()

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        owned = {block_id for table in self.tables for block_id in table}
        assert counts(self.pool) == (len(self.free), len(self.cached), len(owned), len(self.quarantined))
        assert sum(counts(self.pool)) == self.pool.num_blocks
        assert self.pool.num_available == len(self.free) + len(self.cached)
        assert self.pool.num_evictions == self.evictions

    @invariant()
    def named_content_is_found_and_nothing_else(self) -> None:
        for value in {content(name) for name in range(4)} | set(self.named):
            assert self.pool.match_prefix([value]) == ([self.named[value]] if value in self.named else [])


PoolMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestBlockPool = PoolMachine.TestCase

CHAIN = [content(0)]
for _name in (1, 2, 3):
    CHAIN.append(content(_name, CHAIN[-1]))


def allocate_sealed(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """A new sequence's blocks with that content."""
    blocks = pool.allocate(len(hashes))
    for block_id, value in zip(blocks, hashes, strict=True):
        pool.seal(block_id, value)
    return blocks


def test_allocate_when_too_few_blocks_are_left_raises_and_takes_none() -> None:
    pool = BlockPool(4)
    held = pool.allocate(1)
    pool.release(allocate_sealed(pool, CHAIN[:2]))
    with pytest.raises(OutOfBlocks, match=r"^need 4 KV blocks, 3 free$"):
        pool.allocate(4)
    assert counts(pool) == (1, 2, 1, 0)
    assert pool.match_prefix(CHAIN) == [1, 2]
    assert sorted(held + pool.allocate(3)) == [0, 1, 2, 3]


def test_allocate_when_nothing_is_free_evicts_the_least_recently_used_and_tails_before_heads() -> None:
    pool = BlockPool(5)
    old, other = allocate_sealed(pool, CHAIN[:3]), allocate_sealed(pool, [content(8), content(9)])
    pool.release(old)
    pool.release(other)
    pool.share(old)  # used again: now younger than `other`
    pool.release(old)
    assert [pool.allocate(1)[0] for _ in range(5)] == [other[1], other[0], old[2], old[1], old[0]]
    assert pool.num_evictions == 5


def test_allocate_when_free_blocks_are_left_keeps_the_cache() -> None:
    pool = BlockPool(3)
    pool.release(allocate_sealed(pool, CHAIN[:2]))
    assert pool.allocate(1) == [2]
    assert pool.match_prefix(CHAIN) == [0, 1]
    assert pool.num_evictions == 0


def test_match_prefix_when_a_block_in_the_middle_is_gone_ends_before_it() -> None:
    pool = BlockPool(4)
    blocks = allocate_sealed(pool, CHAIN)
    pool.release([blocks[1]])
    pool.clear_cache()
    assert pool.match_prefix(CHAIN) == [blocks[0]]
    assert pool.match_prefix(CHAIN[1:]) == []


def test_seal_when_the_content_is_known_leaves_the_name_to_the_first() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.seal(first, CHAIN[0])
    pool.seal(second, CHAIN[0])
    assert pool.match_prefix(CHAIN[:1]) == [first]
    pool.release([second])
    assert counts(pool) == (2, 0, 1, 0)
    pool.release([first])
    assert counts(pool) == (2, 1, 0, 0)


def test_release_when_others_still_hold_a_block_keeps_it_owned() -> None:
    pool = BlockPool(2)
    blocks = allocate_sealed(pool, CHAIN[:1])
    pool.share(blocks)
    pool.release(blocks)
    assert counts(pool) == (1, 0, 1, 0)
    assert not pool.can_allocate(2)
    pool.release(blocks)
    assert counts(pool) == (1, 1, 0, 0)
    assert pool.can_allocate(2)


def test_can_allocate_when_the_blocks_to_share_are_cached_does_not_count_them() -> None:
    pool = BlockPool(3)
    pool.release(allocate_sealed(pool, CHAIN[:2]))
    matched = pool.match_prefix(CHAIN)
    assert pool.can_allocate(3)
    assert pool.can_allocate(1, shared=matched)
    assert not pool.can_allocate(2, shared=matched)


def test_quarantine_when_a_peer_may_still_write_keeps_blocks_out_of_circulation_until_it_is_lifted() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.quarantine(blocks)
    assert counts(pool) == (1, 0, 0, 2)
    with pytest.raises(OutOfBlocks, match="need 2 KV blocks, 1 free"):
        pool.allocate(2)
    pool.clear_cache()
    pool.lift_quarantine(blocks[:1])
    assert counts(pool) == (2, 0, 0, 1)
    pool.lift_quarantine(blocks[1:])
    assert sorted(pool.allocate(3)) == [0, 1, 2]


def test_clear_cache_when_some_content_is_held_forgets_only_the_rest() -> None:
    pool = BlockPool(4)
    held, dropped = allocate_sealed(pool, CHAIN[:1]), allocate_sealed(pool, [content(9)])
    pool.release(dropped)
    pool.clear_cache()
    assert counts(pool) == (3, 0, 1, 0)
    assert pool.match_prefix(CHAIN) == held
    assert pool.match_prefix([content(9)]) == []


def test_drain_changes_when_content_comes_and_goes_between_two_calls_tells_only_what_differs() -> None:
    pool = BlockPool(2)
    pool.track_changes()
    blocks = allocate_sealed(pool, CHAIN[:2])
    assert pool.drain_changes() == (CHAIN[:2], [])
    pool.release(blocks)
    pool.clear_cache()
    pool.seal(pool.allocate(1)[0], CHAIN[0])  # gone and back
    block = pool.allocate(1)[0]
    pool.seal(block, content(9))  # new and gone
    pool.release([block])
    pool.clear_cache()
    assert pool.drain_changes() == ([], [CHAIN[1]])


def test_track_changes_when_the_pool_holds_content_already_begins_with_that() -> None:
    pool = BlockPool(4)
    pool.release(allocate_sealed(pool, CHAIN[:2]))
    allocate_sealed(pool, [content(9)])
    assert pool.drain_changes() == ([], [])
    pool.track_changes()
    assert pool.drain_changes() == ([*CHAIN[:2], content(9)], [])
