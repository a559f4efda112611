"""Sparse patterns against masks written down from their definitions."""

import pytest
import torch

from kernels.block_lists import BlockLists, dense, dilated, randomly, sinks, sliding_window

SIZE, BLOCKS, HEADS = 4, 9, 3
TOKENS = SIZE * BLOCKS - 1


def causal(lists: BlockLists) -> torch.Tensor:
    return lists.mask(TOKENS, SIZE) & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def by_definition(visible: list[list[list[bool]]]) -> torch.Tensor:
    """From [head][query block][key block]."""
    blocks = torch.tensor(visible)
    tokens = blocks.repeat_interleave(SIZE, 1).repeat_interleave(SIZE, 2)[:, :TOKENS, :TOKENS]
    return tokens & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def grid(rule: "object") -> torch.Tensor:
    assert callable(rule)
    return by_definition([[[bool(rule(head, query, key)) for key in range(BLOCKS)] for query in range(BLOCKS)] for head in range(HEADS)])


def test_dense_sees_all_before() -> None:
    assert torch.equal(causal(dense(BLOCKS, HEADS)), torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(HEADS, -1, -1))


@pytest.mark.parametrize("width", [0, 1, 3, 20])
def test_sliding_window_sees_the_last_blocks(width: int) -> None:
    assert torch.equal(causal(sliding_window(BLOCKS, HEADS, width=width)), grid(lambda _, query, key: query - width <= key <= query))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_longformer_is_a_window_and_global_blocks(count: int) -> None:
    found = causal(sliding_window(BLOCKS, HEADS, width=2) | sinks(BLOCKS, HEADS, count=count))
    assert torch.equal(found, grid(lambda _, query, key: query - 2 <= key <= query or key < count))


def test_bigbird_adds_random_blocks_of_each_head_and_the_seed_decides_which() -> None:
    base = sliding_window(BLOCKS, HEADS, width=1) | sinks(BLOCKS, HEADS, count=1)
    one, again, other = (base | randomly(BLOCKS, HEADS, count=2, seed=seed) for seed in (1, 1, 2))
    assert one == again and one != other
    assert one.seen[0] != one.seen[1]
    for head in range(HEADS):
        for block in range(BLOCKS):
            seen = set(one.seen[head][block])
            assert seen >= set(base.seen[head][block]) and all(0 <= key < block for key in seen)
            assert len(seen) <= len(base.seen[head][block]) + 2
            assert len(set(randomly(BLOCKS, HEADS, count=2, seed=1).seen[head][block])) == min(2, block)


def test_longnet_sees_every_rth_block_of_its_segment_and_heads_take_turns() -> None:
    def rule(head: int, query: int, key: int) -> bool:
        return key == query or (key < query and key // 4 == query // 4 and key % 4 % 2 == head % 2)

    assert torch.equal(causal(dilated(BLOCKS, HEADS, segment=4, rate=2)), grid(rule))


def test_lists_are_ascending_and_what_is_joined_is_seen_once() -> None:
    joined = sliding_window(BLOCKS, HEADS, width=3) | sinks(BLOCKS, HEADS, count=2)
    for blocks in (block for head in joined.seen for block in head):
        assert list(blocks) == sorted(set(blocks))
    assert joined.before(4) == [[0, 1, 2, 3]] * HEADS
