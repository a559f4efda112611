"""How much of a schedule's input could come from caches: what a router's hit ratio has to be read beside.

    infinite       one cache that never evicts: nothing but the schedule limits it
    one pool       one cache with the cluster's capacity, least recently used out first: what perfect routing to perfect memory would reach
    round robin    as many pools as there are workers, requests in turn: what routing that knows nothing gets

Requests pass one after another, with no time between: no queue, no two at once. Reuse follows the engine's rule: full blocks only, and at
least one token of a prompt is computed. A ratio is of tokens: reused ÷ input, over all requests.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.schedule import PlannedRequest, Schedule
from services.engine.block_pool import BlockPool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Ratios of reused to all input tokens."""

    infinite: float
    one_pool: float
    round_robin: float


def block_hash(block_id: int) -> bytes:
    """A content block's id as the hash that pools and indexes know it by: ids are chained already, as hashes are."""
    return block_id.to_bytes(16, "little")


def ceilings(schedule: Schedule, *, num_pools: int, blocks_per_pool: int) -> Ceilings:
    """Of a schedule on a cluster whose caches are `num_pools` pools."""
    return Ceilings(
        infinite=infinite_reuse(schedule),
        one_pool=pooled_reuse(schedule, [num_pools * blocks_per_pool]),
        round_robin=pooled_reuse(schedule, [blocks_per_pool] * num_pools),
    )


def infinite_reuse(schedule: Schedule) -> float:
    """With one cache that never evicts."""
    seen: set[int] = set()
    reused = 0
    for request in schedule.requests:
        ids = request.block_ids()
        reused += schedule.block_size * _leading(ids[: usable_blocks(request, schedule.block_size)], seen)
        seen.update(ids[: request.input_tokens // schedule.block_size])
    return _ratio(reused, schedule.requests)


def pooled_reuse(schedule: Schedule, pool_blocks: Sequence[int]) -> float:
    """With pools of these sizes that take requests in turn."""
    pools = [BlockPool(num_blocks) for num_blocks in pool_blocks]
    reused = 0
    for index, request in enumerate(schedule.requests):
        reused += schedule.block_size * _pass_through(pools[index % len(pools)], request, schedule.block_size)
    return _ratio(reused, schedule.requests)


def shared_tokens(schedule: Schedule) -> list[int]:
    """Of each prompt how many leading tokens another one has too: more than that no cache that was empty can have, whoever came first."""
    counts: Counter[int] = Counter()
    for request in schedule.requests:
        counts.update(request.block_ids())
    several = {block_id for block_id, count in counts.items() if count > 1}
    return [min(request.input_tokens, schedule.block_size * _leading(request.block_ids(), several)) for request in schedule.requests]


def usable_blocks(request: PlannedRequest, block_size: int) -> int:
    """Of a prompt's blocks those that may come from a cache."""
    return (request.input_tokens - 1) // block_size


def _pass_through(pool: BlockPool, request: PlannedRequest, block_size: int) -> int:
    """Has a pool compute a prompt and keep it; returns how many blocks it found."""
    hashes = [block_hash(block_id) for block_id in request.block_ids()[: request.input_tokens // block_size]]
    found = pool.match_prefix(hashes[: usable_blocks(request, block_size)])
    if len(hashes) > pool.num_blocks:
        return 0  # it could not run at all
    pool.share(found)
    new = pool.allocate(len(hashes) - len(found))
    for block_id, content in zip(new, hashes[len(found) :], strict=True):
        pool.seal(block_id, content)
    pool.release(found + new)
    return len(found)


def _leading(block_ids: Iterable[int], seen: set[int]) -> int:
    count = 0
    for block_id in block_ids:
        if block_id not in seen:
            break
        count += 1
    return count


def _ratio(reused: int, requests: Sequence[PlannedRequest]) -> float:
    total = sum(request.input_tokens for request in requests)
    return reused / total if total else 0.0
