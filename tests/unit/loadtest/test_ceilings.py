from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from loadtest.ceilings import ceilings, infinite_reuse, pooled_reuse, shared_tokens
from loadtest.schedule import PlannedRequest, Schedule
from loadtest.traces.mooncake import runs_of

BLOCK = 4

# Chains: an id decides all before it, so a prompt is a path in a tree; node n's parent is (n - 1) // 2.
prompts = st.lists(st.tuples(st.integers(0, 30), st.integers(1, BLOCK)), min_size=1, max_size=25)

# The last block partly filled: one that is full and cached is computed again, into a second place.
unaligned_prompts = st.lists(st.tuples(st.integers(0, 30), st.integers(1, BLOCK - 1)), min_size=1, max_size=25)


def _chain(node: int) -> list[int]:
    return [*(_chain((node - 1) // 2) if node else []), node]


def _schedule(chosen: Sequence[tuple[int, int]]) -> Schedule:
    """Each prompt is the way to a node; its last block has `filled` tokens."""
    requests = []
    for node, filled in chosen:
        ids = _chain(node)
        input_tokens = (len(ids) - 1) * BLOCK + filled
        requests.append(PlannedRequest(at_s=0.0, input_tokens=input_tokens, output_tokens=1, block_runs=runs_of(ids)))
    return Schedule(block_size=BLOCK, requests=tuple(requests), source="tree")


@given(prompts)
def test_infinite_reuse_equals_looking_at_all_earlier_prompts(chosen: list[tuple[int, int]]) -> None:
    schedule = _schedule(chosen)
    reused = 0
    for index, request in enumerate(schedule.requests):
        best = 0
        for earlier in schedule.requests[:index]:
            full = earlier.block_ids()[: earlier.input_tokens // BLOCK]
            same = 0
            for mine, theirs in zip(request.block_ids(), full, strict=False):
                if mine != theirs:
                    break
                same += 1
            best = max(best, min(same, (request.input_tokens - 1) // BLOCK))
        reused += best * BLOCK
    assert infinite_reuse(schedule) == reused / sum(request.input_tokens for request in schedule.requests)


@given(unaligned_prompts, st.integers(6, 12), st.integers(1, 3))
def test_pooled_reuse_equals_a_plain_list_of_recent_blocks(chosen: list[tuple[int, int]], capacity: int, num_pools: int) -> None:
    schedule = _schedule(chosen)
    pools: list[list[int]] = [[] for _ in range(num_pools)]  # least recent first
    reused = 0
    for index, request in enumerate(schedule.requests):
        pool = pools[index % num_pools]
        full = request.block_ids()[: request.input_tokens // BLOCK]
        found = [block for position, block in enumerate(full) if all(earlier in pool for earlier in full[: position + 1])]
        reused += len(found) * BLOCK
        others = [block for block in pool if block not in full]
        # A prompt's end is older than its beginning: it is of use to fewer.
        pools[index % num_pools] = [*others, *reversed(full)][-capacity:]
    assert pooled_reuse(schedule, [capacity] * num_pools) == reused / sum(request.input_tokens for request in schedule.requests)


@given(prompts, st.integers(6, 40), st.integers(1, 4))
def test_ceilings_are_in_order(chosen: list[tuple[int, int]], capacity: int, num_pools: int) -> None:
    found = ceilings(_schedule(chosen), num_pools=num_pools, blocks_per_pool=capacity)
    assert found.one_pool <= found.infinite
    assert found.round_robin <= found.infinite


def test_ceilings_of_a_hand_made_schedule() -> None:
    # Blocks 0-1-3 (12 tokens of 4), again, then 0-1-4; then 0-1-3 once more after the pool of three blocks has lost block 3.
    schedule = _schedule([(3, 4), (3, 4), (4, 4), (3, 4)])
    assert infinite_reuse(schedule) == (0 + 8 + 8 + 8) / 48  # the last block is computed, though it is there
    assert pooled_reuse(schedule, [4, 4]) == (0 + 0 + 8 + 8) / 48


@given(prompts)
def test_shared_tokens_equal_the_longest_beginning_that_another_prompt_has(chosen: list[tuple[int, int]]) -> None:
    schedule = _schedule(chosen)
    ids = [request.block_ids() for request in schedule.requests]
    for index, (request, shared) in enumerate(zip(schedule.requests, shared_tokens(schedule), strict=True)):
        longest = max((_common(ids[index], other) for place, other in enumerate(ids) if place != index), default=0)
        assert shared == min(request.input_tokens, longest * BLOCK)


def _common(one: list[int], other: list[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count
