"""Blocks as others see them: numbered through the pools of all KV groups, one after another; copies, where pools are in a GPU's memory.

A sequence's blocks are those in its places (KVGroups.places), whoever has them. Knows nothing of who reads or writes them, or when.
"""

from collections.abc import Sequence as Numbers

from services.engine.events import NO_BLOCK
from services.engine.model_runner import ModelRunner
from services.engine.sequence import Sequence


class OutsideView:
    """Of the pools of one runner."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._groups = runner.groups

    def block_ids(self, sequence: Sequence) -> tuple[int, ...]:
        """The blocks in the places of all tokens of a sequence."""
        tables, first_ids = sequence.tables, self._runner.first_ids
        if self._groups.windows == (None,):
            return tuple(tables[0].block_ids)
        return tuple(
            tables[group].block_ids[block - tables[group].first] + first_ids[group] if block < tables[group].end else NO_BLOCK
            for group, block in self._groups.places(len(sequence.tokens))
        )

    def by_group(self, block_ids: Numbers[int]) -> list[list[int]]:
        """Which blocks of each group's pool these are."""
        ends = (*self._runner.first_ids[1:], sum(self._runner.num_blocks))
        return [
            [block_id - first for block_id in block_ids if first <= block_id < end]
            for first, end in zip(self._runner.first_ids, ends, strict=True)
        ]

    def copy_in(self, sequence: Sequence, num_tokens: int) -> None:
        """What a peer wrote of the first `num_tokens` tokens."""
        if self._runner.is_staged:
            self._runner.copy_in(self.by_group(self._between(sequence, sequence.num_computed, num_tokens)))

    def copy_out(self, sequence: Sequence, num_tokens: int) -> None:
        """Lets a peer read the first `num_tokens` tokens of a prefill, as far as they fill blocks or are all."""
        if self._runner.is_staged:
            self._runner.copy_out(self.by_group(self._between(sequence, sequence.num_readable, num_tokens)))
            sequence.num_readable = num_tokens // self._groups.block_size * self._groups.block_size

    def _between(self, sequence: Sequence, start: int, end: int) -> list[int]:
        """The blocks that hold tokens start … end - 1, as far as they are in places; one in part only if it is the last."""
        size, is_all = self._groups.block_size, end == len(sequence.tokens)
        first, stop = start // size, self._groups.num_blocks(end) if is_all else end // size
        places = zip(self._groups.places(len(sequence.tokens)), self.block_ids(sequence), strict=True)
        return [block_id for place, block_id in places if first <= place.block < stop]
