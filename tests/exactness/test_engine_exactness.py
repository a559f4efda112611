"""Law 3: nothing that makes a request faster changes its tokens. Each path against the same requests run one at a time.

Identity is required up to the first position where the baseline's two best noisy logits are closer than 1e-4. Every test shows by
the engine's counters that its path was taken, and ends with all blocks free or cached.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.linear import WeightForm, choose_form
from services.core.noise import choice_seed
from services.engine.core import EngineCore
from services.engine.loader import load_model
from services.engine.models.attention import GroupedQueryAttention
from services.engine.sequence import EngineRequest
from services.engine.settings import EngineSettings
from tests.exactness.conftest import NEAR_TIES, WORKLOADS
from tests.exactness.workloads import (
    BLOCK_SIZE,
    LONGEST_PROMPT,
    MIN_TOKENS,
    Baseline,
    Outputs,
    Workload,
    check_all_identical,
    check_balanced,
    check_identical,
    make_core,
    prepend_received,
    received,
    run,
    run_alone,
)

CHUNK_SIZES = range(BLOCK_SIZE, LONGEST_PROMPT + BLOCK_SIZE, BLOCK_SIZE)
REQUESTS_PER_CHUNK_SIZE = 4
SMALL_POOL = 64  # blocks: three to five of the longest sequences
each_fp32 = pytest.mark.parametrize("workload", ["greedy", "sampled", "window"], indirect=True)
# A model of windows alone is not preempted: its sequences have their blocks from the start, and do not grow beyond them.
each_growing = pytest.mark.parametrize("workload", ["greedy", "sampled", "gemma"], indirect=True)
each_layout = pytest.mark.parametrize("workload", ["greedy", "sampled", "window", "gemma"], indirect=True)
only_llama = pytest.mark.parametrize("workload", ["greedy", "sampled"], indirect=True)


def small_pool(workload: Workload) -> int:
    """Blocks that hold three to five sequences; those of layers with windows alone are short."""
    return SMALL_POOL if None in workload.decoder.config.windows else SMALL_POOL // 4


def spread(requests: Sequence[EngineRequest], count: int) -> list[EngineRequest]:
    """`count` requests from all over the list, the first and the longest prompt among them."""
    longest = max(requests, key=lambda request: len(request.prompt_token_ids))
    return list({request.request_id: request for request in (longest, *requests[:: max(1, len(requests) // (count - 1))])}.values())[:count]


def test_near_ties_are_rare(workload: Workload, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """At most 1 % of the comparisons below may stop early. Over eight sets of prompts 0.5 % (greedy) and 0.4 % (sampled) did."""
    name = request.node.callspec.params["workload"]
    num_tokens = sum(len(tokens) for tokens in workload.baseline.tokens.values())
    near_ties, num_requests = workload.baseline.num_near_ties, len(workload.requests)
    record_property(NEAR_TIES, f"{name}: {near_ties} of {num_requests} requests ({num_tokens} tokens) have a near tie")
    assert near_ties * 100 <= num_requests


def test_tokens_when_alone_again_are_identical(workload: Workload) -> None:
    """A new pool, a new core: not even a near tie may move when nothing differs."""
    requests = spread(workload.requests, 3)
    again = run_alone(workload.decoder, requests)
    for request in requests:
        assert again.tokens[request.request_id] == workload.baseline.tokens[request.request_id]
        assert again.margins[request.request_id] == workload.baseline.margins[request.request_id]


def test_tokens_when_batched_with_cold_then_warm_prefixes_are_identical(workload: Workload) -> None:
    """A full batch, in which the first request of a stem computes it for those behind it; then all again, every prefix known."""
    core = make_core(workload.decoder, max_num_seqs=64, prefill_chunk_tokens=LONGEST_PROMPT)
    cold = run(core, workload.requests)
    check_all_identical(workload.baseline, workload.requests, cold)
    stats = check_balanced(core)
    assert stats.largest_batch == min(64, len(workload.requests))
    assert sum(output.cached_tokens > 0 for output in cold.values()) >= len(workload.requests) // 5
    cached_tokens = stats.cached_tokens

    warm = run(core, workload.requests)
    check_all_identical(workload.baseline, workload.requests, warm)
    stats = check_balanced(core)
    # All full blocks of every prompt are found, but for the last when it would leave nothing to compute.
    expected = [(len(request.prompt_token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE for request in workload.requests]
    assert [warm[request.request_id, 0].cached_tokens for request in workload.requests] == expected
    assert stats.cached_tokens - cached_tokens == sum(expected) > 0
    assert (stats.preemptions, stats.evictions) == (0, 0)


@each_fp32
@pytest.mark.parametrize("chunk_tokens", CHUNK_SIZES)
def test_tokens_when_prefill_is_chunked_are_identical(workload: Workload, chunk_tokens: int) -> None:
    """All requests at chunks of one block, where every prompt is cut most; some at every other size up to the longest prompt."""
    requests = workload.requests if chunk_tokens == BLOCK_SIZE else spread(workload.requests, REQUESTS_PER_CHUNK_SIZE)
    core = make_core(workload.decoder, prefill_chunk_tokens=chunk_tokens)
    check_all_identical(workload.baseline, requests, run(core, requests))
    stats = check_balanced(core)
    assert stats.partial_prefills > 0


@each_fp32
@pytest.mark.parametrize("chunk_tokens", [1, 7])
def test_tokens_when_chunks_do_not_fill_blocks_are_identical(workload: Workload, chunk_tokens: int) -> None:
    requests = spread(workload.requests, 3)
    core = make_core(workload.decoder, prefill_chunk_tokens=chunk_tokens)
    check_all_identical(workload.baseline, requests, run(core, requests))
    assert check_balanced(core).partial_prefills >= LONGEST_PROMPT // chunk_tokens - 1


@each_growing
def test_tokens_when_sequences_are_preempted_are_identical(workload: Workload) -> None:
    core = make_core(workload.decoder, num_blocks=SMALL_POOL, prefill_chunk_tokens=64)
    check_all_identical(workload.baseline, workload.requests, run(core, workload.requests))
    stats = check_balanced(core)
    assert stats.preemptions > len(workload.requests) // 10
    assert stats.evictions > 0
    assert stats.blocks_total == SMALL_POOL * len(core.pools)


class Aborts:
    """Aborts half of the requests, each before some step soon after its arrival; remembers how many tokens it had by then."""

    def __init__(
        self, core: EngineCore, requests: Sequence[EngineRequest], *, seed: int, arrivals: Mapping[str, int] | None = None
    ) -> None:
        generator = random.Random(seed)
        arrivals = arrivals or {}
        victims = generator.sample([request.request_id for request in requests], len(requests) // 2)
        # Every request takes more than MIN_TOKENS steps, so none of them ends before it is aborted.
        self.steps = {request_id: arrivals.get(request_id, 0) + generator.randrange(MIN_TOKENS) for request_id in victims}
        self.num_tokens: dict[str, int] = {}
        self._core, self._requests = core, requests

    def before_step(self, step: int, outputs: Outputs) -> None:
        for request_id, at in self.steps.items():
            if at == step:
                self._core.abort(request_id)
                assert outputs[request_id, 0].finish_reason is None
                self.num_tokens[request_id] = len(outputs[request_id, 0].tokens)

    def check(self, baseline: Baseline, outputs: Outputs) -> None:
        """The survivors are identical, and so is what the others returned before their end; nothing came after it."""
        assert len(self.num_tokens) == len(self.steps) == len(self._requests) // 2
        check_all_identical(baseline, [request for request in self._requests if request.request_id not in self.steps], outputs)
        for request_id, num_tokens in self.num_tokens.items():
            output = outputs[request_id, 0]
            assert output.finish_reason is None
            assert len(output.tokens) == num_tokens
            check_identical(baseline, request_id, output)


@each_fp32
def test_tokens_when_neighbours_are_aborted_are_identical(workload: Workload) -> None:
    """Aborted while they wait, between the chunks of their prompts, and while they decode."""
    core = make_core(workload.decoder, prefill_chunk_tokens=128)
    aborts = Aborts(core, workload.requests, seed=3)
    aborts.check(workload.baseline, run(core, workload.requests, before_step=aborts.before_step))
    check_balanced(core)
    assert any(aborts.num_tokens.values())
    assert 0 in aborts.num_tokens.values()


@each_layout
def test_tokens_when_everything_happens_at_once_are_identical(workload: Workload) -> None:
    """Requests come one by one into a warm small pool, in chunks, are preempted, and half of them are aborted."""
    requests = workload.requests[:50]
    core = make_core(workload.decoder, num_blocks=small_pool(workload), max_num_seqs=12, prefill_chunk_tokens=48)
    run(core, requests[:8])
    before = check_balanced(core)
    generator = random.Random(4)
    arrivals = {request.request_id: generator.randrange(2 * len(requests)) for request in requests}
    aborts = Aborts(core, requests, seed=5, arrivals=arrivals)
    aborts.check(workload.baseline, run(core, requests, arrivals=arrivals, before_step=aborts.before_step))
    stats = check_balanced(core)
    grows = None in workload.decoder.config.windows
    for counter in ("cached_tokens", "partial_prefills", "evictions", *(("preemptions",) if grows else ())):
        assert getattr(stats, counter) > getattr(before, counter), counter


@only_llama
def test_choices_when_n_is_three_equal_requests_with_their_seeds(workload: Workload) -> None:
    requests = spread(workload.requests, 6)
    baselines = [workload.baseline]
    for choice in (1, 2):
        seeds = {request.request_id: choice_seed(request.sampling.seed or 0, choice) for request in requests}
        seeded = [replace(request, sampling=replace(request.sampling, seed=seeds[request.request_id])) for request in requests]
        baselines.append(workload.baseline if requests[0].sampling.is_greedy else run_alone(workload.decoder, seeded))
    for num_blocks in (2000, SMALL_POOL):
        core = make_core(workload.decoder, num_blocks=num_blocks)
        outputs = run(core, [replace(request, sampling=replace(request.sampling, n=3)) for request in requests])
        for choice, baseline in enumerate(baselines):
            check_all_identical(baseline, requests, outputs, choice=choice)
        stats = check_balanced(core)
        assert stats.cached_tokens > 0  # the further choices find their prompt's blocks
        assert (stats.preemptions > 0) == (num_blocks == SMALL_POOL)


@only_llama
def test_tokens_when_continued_from_received_tokens_are_identical(workload: Workload) -> None:
    """What a router does when a worker dies: another one goes on from the tokens received so far, penalties and min_tokens included."""
    continued = received(workload.requests, workload.baseline)
    core = make_core(workload.decoder)
    outputs = run(core, continued)
    prepend_received(outputs, continued)
    check_all_identical(workload.baseline, workload.requests, outputs)
    assert check_balanced(core).largest_batch == min(64, len(continued))


@pytest.mark.parametrize("workload", ["bf16"], indirect=True)
def test_tokens_when_loaded_as_a_process_does_are_identical(workload: Workload, checkpoints: Path) -> None:
    """A bf16 checkpoint through load_model, with calibrated chunks and a running clock."""
    settings = EngineSettings(block_size=BLOCK_SIZE, max_model_len=512, kv_memory_bytes=1 << 24)
    loaded = load_model(checkpoints / WORKLOADS["bf16"][0], settings)
    assert loaded.dtype == torch.float32
    assert loaded.config.dtype == "bfloat16"
    if choose_form(torch.ones(1, 1, dtype=torch.bfloat16), torch.float32) is WeightForm.HALF:
        attention = workload.decoder.layers[0].attention
        assert isinstance(attention, GroupedQueryAttention)
        assert attention.qkv.form is WeightForm.HALF
    requests = [replace(request, sampling=replace(request.sampling, ignore_eos=True)) for request in workload.requests]
    check_all_identical(workload.baseline, requests, run(loaded.core, requests))
    assert check_balanced(loaded.core).largest_batch == len(requests)
