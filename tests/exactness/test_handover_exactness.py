"""Law 3 with prefill and decode on two engines: the same requests, the same tokens, whoever computes the prompt and whatever happens to it.

The engines have pools of different sizes and different chunks; the test copies blocks from one pool to the other.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.core.noise import choice_seed
from services.engine.core import EngineCore
from services.engine.model_runner import ModelRunner
from services.engine.sequence import EngineRequest
from tests.exactness.pair import Pair, Plan, Way
from tests.exactness.test_engine_exactness import each_layout, only_llama, spread
from tests.exactness.workloads import BLOCK_SIZE, Workload, check_all_identical, make_core, prepend_received, received, run_alone


def make_pair(workload: Workload, *, prefill_blocks: int = 900, decode_blocks: int = 2000, max_num_seqs: int = 64) -> Pair:
    prefill = make_core(workload.decoder, num_blocks=prefill_blocks, max_num_seqs=4, prefill_chunk_tokens=72)
    return Pair(prefill, make_core(workload.decoder, num_blocks=decode_blocks, max_num_seqs=max_num_seqs))


def full_blocks(requests: Sequence[EngineRequest]) -> int:
    """Blocks of all prompts that the prefix cache may answer for."""
    return sum((len(request.prompt_token_ids) - 1) // BLOCK_SIZE for request in requests)


def all_blocks(requests: Sequence[EngineRequest]) -> int:
    return sum(-(-len(request.prompt_token_ids) // BLOCK_SIZE) for request in requests)


def computed_tokens(core: EngineCore) -> int:
    stats = core.stats()
    return stats.prefill_tokens + stats.decode_tokens


@each_layout
def test_tokens_when_prompts_are_computed_elsewhere_with_cold_and_warm_caches_are_identical(workload: Workload) -> None:
    """Nothing known anywhere; then the same requests, with all that can be cached known to prefill, to decode, and to both."""
    requests = workload.requests
    pair = make_pair(workload)
    for warm in ("nowhere", "on prefill", "on decode", "on both"):
        if warm == "on prefill":
            pair.decode.pool.clear_cache()
        elif warm == "on decode":
            pair.prefill.pool.clear_cache()
        moved, computed, cached = pair.num_blocks_moved, computed_tokens(pair.prefill), pair.prefill.stats().cached_tokens
        check_all_identical(workload.baseline, requests, pair.run(requests))
        if warm in ("on decode", "on both"):
            # The last block of each, in each KV group.
            assert pair.num_blocks_moved - moved == len(requests) * len(pair.decode.pools)
        else:
            assert pair.num_blocks_moved - moved > 2 * len(requests)
        if warm in ("on prefill", "on both"):
            assert pair.prefill.stats().cached_tokens - cached == full_blocks(requests) * BLOCK_SIZE
        else:
            assert computed_tokens(pair.prefill) - computed > full_blocks(requests) * BLOCK_SIZE // 2
        stats = pair.decode.stats()
        assert (stats.prefill_tokens, stats.partial_prefills, stats.preemptions) == (0, 0, 0)  # decode computed no prompt


@only_llama
def test_tokens_when_continued_requests_are_computed_elsewhere_are_identical(workload: Workload) -> None:
    """A decode worker dies: prompt and received tokens are computed on prefill for another one, some of them there, after all."""
    continued = received(workload.requests, workload.baseline)
    ways = (Plan(), Plan(way=Way.COMPUTE_HERE, give_up_at=2 * BLOCK_SIZE), Plan())
    plans = {request.request_id: ways[index % len(ways)] for index, request in enumerate(continued)}
    pair = make_pair(workload)
    outputs = pair.run(continued, plans)
    prepend_received(outputs, continued)
    check_all_identical(workload.baseline, workload.requests, outputs)
    assert pair.num_blocks_moved > len(continued)
    assert pair.num_gave_up == len(continued) // 3


@only_llama
def test_choices_when_prompts_are_computed_elsewhere_equal_requests_with_their_seeds(workload: Workload) -> None:
    requests = spread(workload.requests, 8)
    baselines = [workload.baseline]
    for choice in (1, 2):
        seeds = {request.request_id: choice_seed(request.sampling.seed or 0, choice) for request in requests}
        seeded = [replace(request, sampling=replace(request.sampling, seed=seeds[request.request_id])) for request in requests]
        baselines.append(workload.baseline if requests[0].sampling.is_greedy else run_alone(workload.decoder, seeded))
    pair = make_pair(workload)
    outputs = pair.run([replace(request, sampling=replace(request.sampling, n=3)) for request in requests])
    for choice, baseline in enumerate(baselines):
        check_all_identical(baseline, requests, outputs, choice=choice)
    # Choices 1 and 2 of each compute no more than what the full blocks of the prompt lack, and their first token.
    assert pair.decode.stats().prefill_tokens <= 2 * len(requests) * (BLOCK_SIZE + 1)
    assert pair.decode.stats().cached_tokens >= 2 * full_blocks(requests) * BLOCK_SIZE


@each_layout
@pytest.mark.parametrize("way", [Way.COMPUTE_HERE, Way.QUARANTINE])
def test_tokens_when_prefill_is_given_up_on_the_way_are_identical(workload: Workload, way: Way) -> None:
    """After any part of the prompt has landed, nothing and all of it included."""
    requests = workload.requests
    generator = random.Random(6)
    plans = {r.request_id: Plan(way=way, give_up_at=generator.randint(0, len(r.prompt_token_ids))) for r in requests}
    pair = make_pair(workload)
    check_all_identical(workload.baseline, requests, pair.run(requests, plans))
    assert pair.num_gave_up == len(requests)
    assert 0 < pair.num_blocks_moved < all_blocks(requests)
    num_outputs = sum(len(tokens) - 1 for tokens in workload.baseline.tokens.values())
    prompts = {request.request_id: len(request.prompt_token_ids) for request in requests}
    assert computed_tokens(pair.decode) > num_outputs
    # It goes on from what has landed, where that is all that the next token sees.
    if way is Way.COMPUTE_HERE and pair.decode.groups.windows == (None,):
        landed = sum(min(plans[name].give_up_at, length - 1) // BLOCK_SIZE * BLOCK_SIZE for name, length in prompts.items())
        assert computed_tokens(pair.decode) - num_outputs <= sum(prompts.values()) - landed


@each_layout
def test_tokens_when_everything_happens_at_once_in_small_pools_are_identical(workload: Workload) -> None:
    """All ways to a prompt, side by side, twice; both pools hold a few requests, so that they are preempted, evicted and kept waiting."""
    requests = workload.requests[:60]
    generator = random.Random(7)
    pair = make_pair(workload, prefill_blocks=40, decode_blocks=72, max_num_seqs=12)
    for _ in range(2):
        ways = {request.request_id: generator.choice(list(Way)) for request in requests}
        plans = {r.request_id: Plan(way=ways[r.request_id], give_up_at=generator.randint(0, len(r.prompt_token_ids))) for r in requests}
        check_all_identical(workload.baseline, requests, pair.run(requests, plans))
    stats = pair.decode.stats()
    assert stats.preemptions > 0 or None not in pair.decode.groups.windows  # windows alone do not grow
    assert stats.evictions > 0
    assert pair.prefill.stats().evictions > 0
    assert pair.num_gave_up > 0


@pytest.mark.parametrize("workload", ["gemma", "latent"], indirect=True)
@pytest.mark.parametrize("way", [Way.LANDED, Way.COMPUTE_HERE])
def test_tokens_when_others_see_a_copy_of_the_pools_are_identical(workload: Workload, way: Way) -> None:
    """As on a GPU, whose memory no peer can reach: blocks are copied out before somebody reads them, and in when they have landed."""

    def core(num_blocks: int, **settings: int) -> EngineCore:
        numbers = [num_blocks] * len(workload.decoder.config.group_windows)
        num_bytes = sum(num_blocks * layout.block_bytes for layout in workload.decoder.kv_layouts(BLOCK_SIZE))
        # What lies there before must not matter.
        buffer = memoryview(bytearray(b"\xff" * num_bytes))
        runner = ModelRunner(workload.decoder, block_size=BLOCK_SIZE, num_blocks=numbers, kv_buffer=buffer, is_staged=True)
        return make_core(workload.decoder, num_blocks=num_blocks, runner=runner, **settings)

    generator = random.Random(8)
    plans = {r.request_id: Plan(way=way, give_up_at=generator.randint(0, len(r.prompt_token_ids))) for r in workload.requests}
    pair = Pair(core(900, max_num_seqs=4, prefill_chunk_tokens=72), core(900))
    for _ in range(2):  # the second time with warm caches
        check_all_identical(workload.baseline, workload.requests, pair.run(workload.requests, plans))
    assert pair.num_blocks_moved > 0


@pytest.mark.parametrize("workload", ["window", "gemma"], indirect=True)
def test_bytes_when_layers_have_windows_are_those_of_their_windows_and_pools_keep_no_more(workload: Workload) -> None:
    config = workload.decoder.config
    request = max(workload.requests, key=lambda request: request.num_tokens)
    end = -(-request.num_tokens // BLOCK_SIZE)
    last = (request.num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE  # the first token of the last block sees the most
    blocks = [end if window is None else end - (last - window + 1) // BLOCK_SIZE for window in config.windows]
    layer_bytes = config.num_kv_heads * BLOCK_SIZE * 2 * config.head_dim * 4
    pair = make_pair(workload)
    check_all_identical(workload.baseline, [request], pair.run([request]))
    assert pair.num_bytes_moved == sum(blocks) * layer_bytes < 0.6 * len(blocks) * end * layer_bytes
    for pool, window in zip(pair.decode.pools, config.group_windows, strict=True):
        most = end + 1 if window is None else -(-window // BLOCK_SIZE) + 2
        assert pool.num_cached <= most + -(-len(workload.baseline.tokens[request.request_id]) // BLOCK_SIZE)


@pytest.mark.parametrize("workload", ["greedy", "window", "gemma"], indirect=True)
def test_room_when_it_is_told_is_in_blocks_of_tokens(workload: Workload) -> None:
    """A router compares it with the blocks of prompts: windows' blocks hold no more tokens, and a window alone takes any number."""
    core = make_core(workload.decoder, num_blocks=20)
    more = 0 if None in workload.decoder.config.windows else -(-core.max_model_len // BLOCK_SIZE)
    room = core.stats().room
    assert (room.total, room.free, room.cached, room.owned) == (20 + more, 20 + more, 0, 0)
    assert room.total * BLOCK_SIZE >= core.max_model_len
    core.add(workload.requests[0])
    core.step()
    room = core.stats().room
    assert room.owned == core.pool.num_owned > 0
    assert room.free + room.cached + room.owned + room.quarantined == room.total == 20 + more
