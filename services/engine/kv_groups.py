"""KV groups: the layers of a model that keep the same tokens share tables of blocks and a pool; which blocks that is, in plain numbers.

Layers with a window keep what the first token of the last block saw: all that is still seen, and enough for the same prompt to go on from
there when it comes again. Everything here follows from the model and a number of tokens, so that
whoever sends blocks and whoever receives them agree without a word. Knows nothing of pools or sequences.
Source: the hybrid KV cache manager of vLLM and Jenga (Zhang et al. 2025), without their equal page sizes.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """Block `block` of a sequence (its tokens block * block_size …) in KV group `group`."""

    group: int
    block: int


@dataclass(frozen=True, slots=True)
class KVGroups:
    """
    windows      of each group, in tokens; None: all tokens are kept
    block_size   tokens
    """

    windows: tuple[int | None, ...]
    block_size: int

    def first_block(self, group: int, position: int) -> int:
        """The first block of which a token at `position` sees anything in this group's layers."""
        window = self.windows[group]
        return 0 if window is None else max(position - window + 1, 0) // self.block_size

    def first_kept(self, group: int, num_tokens: int) -> int:
        """The first block that is kept in this group once there are `num_tokens` tokens."""
        return self.first_block(group, (num_tokens - 1) // self.block_size * self.block_size)

    def num_blocks(self, num_tokens: int) -> int:
        """That so many tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def places(self, num_tokens: int, first_block: int = 0) -> list[Place]:
        """Where the kept blocks of `num_tokens` tokens are, from block `first_block` on, block by block: the order of a transfer."""
        firsts = [max(self.first_kept(group, num_tokens), first_block) for group in range(len(self.windows))]
        return [
            Place(group, block)
            for block in range(min(firsts), self.num_blocks(num_tokens))
            for group, first in enumerate(firsts)
            if block >= first
        ]

    def most_blocks(self, group: int, chunk_tokens: int) -> int | None:
        """The most blocks that a sequence needs in a group with a window to compute any `chunk_tokens` tokens; None without a window."""
        window = self.windows[group]
        return None if window is None else self.num_blocks(window - 1 + chunk_tokens) + 2
