"""Gives sequences their blocks, in every KV group at once, and takes them back: prefix reuse, growth, windows that move on.

A sequence that is computed here has room for all its tokens from its admission on. In a group with a window that is room for the window and
a chunk: as the window moves on, the blocks behind it are released and as many are taken ahead, in one go, so that nobody who has begun
waits for a block; for one that others go on holding there is another in reserve (BlockPool's has_room_for_each). What is released stays
cached by its content, like everything else. Each call changes all groups, or nothing.

Knows nothing of queues or of time; the pools keep the books.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass

from services.engine.block_pool import BlockPool
from services.engine.kv_groups import KVGroups
from services.engine.sequence import BlockTable, Purpose, Sequence


@dataclass(frozen=True, slots=True)
class Finding:
    """What a waiting sequence would get: `num_cached` leading blocks need not be computed; in each group a table that begins with blocks
    that are there already, and how many more it needs."""

    num_cached: int
    tables: list[BlockTable]
    missing: list[int]


class KVCache:
    """The pools of a model's KV groups. One thread calls it."""

    def __init__(self, num_blocks: List[int], groups: KVGroups, *, chunk_tokens: int) -> None:
        """
        num_blocks     of each group's pool
        chunk_tokens   the most of one sequence that a step computes
        """
        windows = zip(num_blocks, groups.windows, strict=True)
        self.pools = [BlockPool(number, has_room_for_each=window is not None) for number, window in windows]
        self.groups = groups
        self._most_blocks = [groups.most_blocks(group, chunk_tokens) for group in range(len(num_blocks))]

    def find(self, sequence: Sequence) -> Finding | None:
        """The cached blocks of a waiting sequence's prefix, and the room for the rest; None if there is not enough."""
        groups, num_tokens = self.groups, len(sequence.tokens)
        # At least one token is computed even if all blocks are cached: somebody has to make the logits. All are, where all logits count.
        usable = 0 if sequence.prompt_logprobs is not None else (num_tokens - 1) // groups.block_size
        hashes = sequence.hash_full_blocks(groups.block_size)[:usable]
        num_cached = self._longest_prefix(hashes)
        tables, missing = [], []
        for group, pool in enumerate(self.pools):
            first, end = self._range(sequence, group, num_cached)
            shared = [pool.find(block_hash) for block_hash in hashes[first:num_cached]]
            found = [block_id for block_id in shared if block_id is not None]
            assert len(found) == len(shared)
            if not pool.can_allocate(end - first - len(found), shared=found):
                return None
            tables.append(BlockTable(first, found))
            missing.append(end - first - len(found))
        return Finding(num_cached, tables, missing)

    def admit(self, sequence: Sequence, finding: Finding) -> None:
        """Gives a sequence what was found for it."""
        for pool, table, missing in zip(self.pools, finding.tables, finding.missing, strict=True):
            pool.share(table.block_ids)
            table.block_ids.extend(pool.allocate(missing))
        sequence.tables = finding.tables
        sequence.num_sealed = finding.num_cached
        sequence.num_computed = finding.num_cached * self.groups.block_size

    def make_room(self, sequence: Sequence) -> bool:
        """Takes the blocks that the sequence's newest token needs, if it needs any and there are enough."""
        num_blocks = self.groups.num_blocks(len(sequence.tokens))
        missing = [num_blocks - table.end for table in sequence.tables]
        if not all(pool.can_allocate(number) for pool, number in zip(self.pools, missing, strict=True)):
            return False
        for pool, table, number in zip(self.pools, sequence.tables, missing, strict=True):
            table.block_ids.extend(pool.allocate(number))
        return True

    def can_go_on(self, sequence: Sequence, num_computed: int) -> bool:
        """Whether all that the token after the first `num_computed` sees is in the sequence's blocks, once those are written."""
        return all(self.groups.first_block(group, num_computed) >= table.first for group, table in enumerate(sequence.tables))

    def computed(self, sequence: Sequence, num_computed: int) -> None:
        """Keys and values of the first `num_computed` tokens are there: names the blocks that they filled, and lets the windows move on."""
        groups = self.groups
        sequence.num_computed = num_computed
        num_full = num_computed // groups.block_size
        if num_full > sequence.num_sealed:
            hashes = sequence.hash_full_blocks(groups.block_size)
            for pool, table in zip(self.pools, sequence.tables, strict=True):
                for block in range(max(sequence.num_sealed, table.first), num_full):
                    pool.seal(table.block_ids[block - table.first], hashes[block])
            sequence.num_sealed = num_full
        for group, (pool, table, most) in enumerate(zip(self.pools, sequence.tables, self._most_blocks, strict=True)):
            passed = groups.first_kept(group, num_computed) - table.first
            if most is None or passed <= 0:
                continue
            pool.release(table.block_ids[:passed])
            del table.block_ids[:passed]
            table.first += passed
            ahead = min(groups.num_blocks(len(sequence.tokens)), table.first + most) - table.end
            table.block_ids.extend(pool.allocate(max(ahead, 0)))  # no more than were released just now: there are as many

    def release(self, sequence: Sequence) -> None:
        """Takes all blocks back; what is sealed stays cached."""
        for pool, table in zip(self.pools, sequence.tables, strict=bool(sequence.tables)):
            pool.release(table.block_ids)
        sequence.tables = []
        sequence.num_computed = sequence.num_sealed = 0

    def quarantine(self, sequence: Sequence) -> None:
        """Takes all blocks back; those into which a peer may still write go into quarantine."""
        for group, (pool, table) in enumerate(zip(self.pools, sequence.tables, strict=True)):
            open_from = max(self.groups.first_kept(group, len(sequence.tokens)), sequence.num_sealed) - table.first
            pool.quarantine(table.block_ids[open_from:])
            del table.block_ids[open_from:]
        self.release(sequence)

    def _range(self, sequence: Sequence, group: int, num_cached: int) -> tuple[int, int]:
        """The blocks first … end - 1 that a sequence gets at its admission."""
        groups, num_tokens, most = self.groups, len(sequence.tokens), self._most_blocks[group]
        first, end = groups.first_block(group, num_cached * groups.block_size), groups.num_blocks(num_tokens)
        if most is None:
            return first, end
        if sequence.purpose is not Purpose.RECEIVE:
            return first, min(end, first + most)
        # A peer fills only what is kept. With what is cached before that, the prompt could be computed here as well; but not across a gap,
        # which nobody would fill.
        first_received = groups.first_kept(group, num_tokens)
        return (first if first_received <= num_cached and end - first <= most else first_received), end

    def _longest_prefix(self, hashes: List[bytes]) -> int:
        """The most leading blocks after which a sequence can go on: in every group, all that its next token sees is there."""
        longest = len(hashes)
        windowed = []
        for group, (pool, window) in enumerate(zip(self.pools, self.groups.windows, strict=True)):
            if window is None:
                longest = min(longest, len(pool.match_prefix(hashes[:longest])))
            else:
                windowed.append((group, pool))
        if not windowed:
            return longest
        # For each group how many blocks before block i are there without a gap, i = 0 … longest.
        runs: list[tuple[int, list[int]]] = []
        for group, pool in windowed:
            run = [0]
            for block_hash in hashes[:longest]:
                run.append(0 if pool.find(block_hash) is None else run[-1] + 1)
            runs.append((group, run))
        size = self.groups.block_size
        while longest and any(run[longest] < longest - self.groups.first_block(group, longest * size) for group, run in runs):
            longest -= 1
        return longest
