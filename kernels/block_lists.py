"""Sparse attention as data: for every block of queries and every KV head, the earlier blocks of keys that its queries see.

The unit is a KV block, so that a pattern costs what it visits; a query block's own keys are always seen, up to each query. Patterns join by
`|`. Knows nothing of kernels; they read the lists, and `mask` is what tests check them against.

    sliding_window    the last few blocks                                            Longformer (Beltagy et al. 2020), Mistral
    sinks             the first few blocks                                           StreamingLLM (Xiao et al. 2023)
    randomly          a few anywhere, drawn by a seed for each head                  BigBird (Zaheer et al. 2020)
    dilated           of each segment every r-th block, heads beginning one further  LongNet (Ding et al. 2023)

Longformer is sliding_window | sinks with the global tokens in the first blocks; BigBird adds randomly.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class BlockLists:
    """seen[head][block]: which blocks before it a query block sees, ascending. Heads are KV heads."""

    seen: Sequence[Sequence[Sequence[int]]]

    def before(self, query_block: int) -> list[Sequence[int]]:
        """For each head, the blocks that this query block sees besides its own."""
        return [blocks[query_block] for blocks in self.seen]

    def __or__(self, other: "BlockLists") -> "BlockLists":
        """What either sees; of equally many heads and blocks."""
        return BlockLists(
            [
                [sorted({*mine, *theirs}) for mine, theirs in zip(my_head, their_head, strict=True)]
                for my_head, their_head in zip(self.seen, other.seen, strict=True)
            ]
        )

    def mask(self, num_tokens: int, block_size: int) -> torch.Tensor:
        """[heads, num_tokens, num_tokens], True where a query sees a key; causality within a block is not in it."""
        num_blocks = -(-num_tokens // block_size)
        by_block = torch.eye(num_blocks, dtype=torch.bool).repeat(len(self.seen), 1, 1)
        for head, blocks in enumerate(self.seen):
            for query_block in range(num_blocks):
                by_block[head, query_block, list(blocks[query_block])] = True
        return by_block.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)[:, :num_tokens, :num_tokens]


def dense(num_blocks: int, num_heads: int) -> BlockLists:
    return BlockLists([[list(range(block)) for block in range(num_blocks)]] * num_heads)


def sliding_window(num_blocks: int, num_heads: int, *, width: int) -> BlockLists:
    """The `width` blocks before each."""
    return BlockLists([[list(range(max(0, block - width), block)) for block in range(num_blocks)]] * num_heads)


def sinks(num_blocks: int, num_heads: int, *, count: int) -> BlockLists:
    return BlockLists([[list(range(min(count, block))) for block in range(num_blocks)]] * num_heads)


def randomly(num_blocks: int, num_heads: int, *, count: int, seed: int) -> BlockLists:
    draw = random.Random(seed)
    return BlockLists([[sorted(draw.sample(range(block), min(count, block))) for block in range(num_blocks)] for _ in range(num_heads)])


def dilated(num_blocks: int, num_heads: int, *, segment: int, rate: int) -> BlockLists:
    """Of each segment of `segment` blocks every `rate`-th, as far as it lies before the query's block in the same segment."""
    heads = []
    for head in range(num_heads):
        offset = head % rate
        heads.append(
            [
                [other for other in range(block // segment * segment, block) if other % segment % rate == offset]
                for block in range(num_blocks)
            ]
        )
    return BlockLists(heads)
