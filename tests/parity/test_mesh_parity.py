"""Law 3 through the whole mesh: 100 prompts, greedy and seeded, at least 64 tokens each, give the tokens of a single engine on every path.

Each test shows by the workers' and the requests' own books that its path was taken: transports, blocks moved, prefix hits. Identity is
required up to the first near tie of the single engine, as in tests/exactness, which also tells how many prompts have one (at most 1 %).
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from services.core.types import SamplingParams
from services.engine.sequence import EngineRequest
from tests.exactness.workloads import BLOCK_SIZE, MAX_MODEL_LEN, Baseline, Output, Workload, check_identical
from tests.mesh import Mesh, Reply

CONCURRENCY = 16
ALWAYS_REMOTE = 0  # RouterSettings.max_local_tokens
BLOCK_BYTES = 3 * 2 * BLOCK_SIZE * 2 * 16 * 4  # layers, KV heads, tokens, K and V, head size, fp32

each_kind = pytest.mark.parametrize("kind", ["greedy", "sampled"])


@pytest.fixture
def mesh_workload(kind: str, load_workload: Callable[[str], Workload]) -> Workload:
    return load_workload(kind)


def open_mesh(checkpoints: Path, *, checkpoint: str = "llama3", **settings: Any) -> Mesh:
    return Mesh(checkpoints / checkpoint, dtype="float32", max_model_len=MAX_MODEL_LEN, kv_memory_bytes=2000 * BLOCK_BYTES, **settings)


async def run_all(mesh: Mesh, routers: Sequence[str], requests: Sequence[EngineRequest]) -> dict[str, Reply]:
    """Every request, a few at a time, over the routers in turn."""
    places = asyncio.Semaphore(CONCURRENCY)
    replies: dict[str, Reply] = {}

    async def run(index: int, request: EngineRequest) -> None:
        async with places:
            router = routers[index % len(routers)]
            replies[request.request_id] = await mesh.generate(router, request.prompt_token_ids, request.sampling)

    async with asyncio.TaskGroup() as tasks:
        for index, request in enumerate(requests):
            tasks.create_task(run(index, request))
    return replies


def without_eos(workload: Workload) -> list[EngineRequest]:
    """The requests as the baseline ran them: its engine knew no end tokens."""
    return [replace(request, sampling=replace(request.sampling, ignore_eos=True)) for request in workload.requests]


def check(baseline: Baseline, replies: dict[str, Reply]) -> None:
    assert len(replies) == len(baseline.tokens)
    for request_id, reply in replies.items():
        assert reply.finish_reasons[0] is not None
        check_identical(baseline, request_id, Output(tokens=reply.tokens[0], finish_reason=reply.finish_reasons[0]))
        assert reply.usage.completion_tokens == len(reply.tokens[0])


def num_blocks(request: EngineRequest) -> int:
    return -(-len(request.prompt_token_ids) // BLOCK_SIZE)


async def check_moved(mesh: Mesh, router: str, replies: dict[str, Reply]) -> int:
    """All pools are balanced, and what workers say they sent and received is what the requests say has moved. Returns the blocks."""
    loads = await mesh.loads(router)
    for load in loads.values():
        assert load.blocks_free + load.blocks_cached == load.blocks_total
        assert load.blocks_quarantined == 0
    blocks = sum(reply.timing.kv_blocks for reply in replies.values())
    assert sum(reply.timing.kv_bytes for reply in replies.values()) == blocks * BLOCK_BYTES
    return blocks


@each_kind
@pytest.mark.parametrize("transport", ["shm", "tcp", "grpc"])
def test_tokens_when_prefilled_elsewhere_are_those_of_one_engine(transport: str, mesh_workload: Workload, checkpoints: Path) -> None:
    async def main() -> None:
        async with open_mesh(checkpoints, kv_transports=(transport,)) as mesh:
            workers = [await mesh.prefill("p0"), await mesh.prefill("p1"), await mesh.decode("d0"), await mesh.decode("d1")]
            router = await mesh.router(workers, max_local_tokens=ALWAYS_REMOTE)
            requests = without_eos(mesh_workload)
            replies = await run_all(mesh, [router], requests)
            check(mesh_workload.baseline, replies)
            assert {reply.timing.kv_transport for reply in replies.values()} == {transport}
            assert {reply.timing.prefill_worker_id for reply in replies.values()} == {"p0", "p1"}
            assert {reply.timing.decode_worker_id for reply in replies.values()} == {"d0", "d1"}
            for request in requests:
                timing = replies[request.request_id].timing
                # Exactly what decode did not hold has moved.
                assert timing.kv_blocks == num_blocks(request) - timing.decode_cached_tokens // BLOCK_SIZE
            blocks = await check_moved(mesh, router, replies)
            loads = await mesh.loads(router)
            assert sum(loads[worker].kv_bytes_sent for worker in ("p0", "p1")) == blocks * BLOCK_BYTES
            assert sum(loads[worker].kv_bytes_received for worker in ("d0", "d1")) == blocks * BLOCK_BYTES
            # Decode workers computed no prompt, prefill workers no token after the first.
            assert all(loads[worker].prefill_tokens == 0 for worker in ("d0", "d1"))

    asyncio.run(main())


@pytest.mark.parametrize(("kind", "checkpoint"), [("window", "mistral"), ("gemma", "gemma3")])
def test_tokens_of_models_with_windows_are_those_of_one_engine(mesh_workload: Workload, checkpoint: str, checkpoints: Path) -> None:
    """Prefilled elsewhere, of which layers with a window send what it reaches and no more, and by decode itself."""
    config = mesh_workload.decoder.config
    layer_bytes = config.num_kv_heads * BLOCK_SIZE * 2 * config.head_dim * 4

    async def main() -> None:
        async with open_mesh(checkpoints, checkpoint=checkpoint) as mesh:
            requests = without_eos(mesh_workload)
            workers = [await mesh.prefill("p0"), await mesh.decode("d0")]
            router = await mesh.router(workers, max_local_tokens=ALWAYS_REMOTE)
            remote = await run_all(mesh, [router], requests)
            for request in requests:
                timing, last = remote[request.request_id].timing, (request.num_tokens - 1) // BLOCK_SIZE
                firsts = [0 if window is None else max(last * BLOCK_SIZE - window + 1, 0) // BLOCK_SIZE for window in config.windows]
                if not timing.decode_cached_tokens:
                    assert timing.kv_bytes == sum(last + 1 - first for first in firsts) * layer_bytes
            assert any(timing.kv_bytes < num_blocks(request) * len(config.windows) * layer_bytes for request in requests)
            loads = (await mesh.loads(router)).values()
            assert all(load.blocks_free + load.blocks_cached == load.blocks_total for load in loads)
            assert len({load.kv_bytes_sent + load.kv_bytes_received for load in loads}) == 1
            local = await run_all(mesh, [await mesh.router([await mesh.decode("d1")])], requests)
            for replies, prefill in ((remote, "p0"), (local, "")):
                check(mesh_workload.baseline, replies)
                assert {reply.timing.prefill_worker_id for reply in replies.values()} == {prefill}

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_tokens_when_keys_and_values_are_quantized_are_those_of_one_engine_that_quantizes(
    mesh_workload: Workload, kind: str, checkpoints: Path
) -> None:
    """Fewer bytes move, by as much as the format says, and the same tokens come out, computed elsewhere or here."""

    async def main() -> None:
        async with open_mesh(checkpoints, kv_dtype=kind) as mesh:
            workers = [await mesh.prefill("p0"), await mesh.decode("d0")]
            requests = without_eos(mesh_workload)
            remote = await run_all(mesh, [await mesh.router(workers, max_local_tokens=ALWAYS_REMOTE)], requests)
            local = await run_all(mesh, [await mesh.router([await mesh.decode("d1")])], requests)
            for replies in (remote, local):
                check(mesh_workload.baseline, replies)
            assert {reply.timing.prefill_worker_id for reply in remote.values()} == {"p0"}
            assert {reply.timing.prefill_worker_id for reply in local.values()} == {""}
            bits = {"fp8": 8, "int8": 8, "int4": 4}[kind]
            block_bytes = 3 * 2 * BLOCK_SIZE * (2 * 16 * bits // 8 + 4)  # layers, KV heads, tokens, K and V with their two fp16 scales
            moved = sum(reply.timing.kv_blocks for reply in remote.values())
            assert moved > 0
            assert sum(reply.timing.kv_bytes for reply in remote.values()) == moved * block_bytes

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["latent"])
def test_tokens_of_a_model_with_latents_are_those_of_one_engine_and_an_eighth_of_the_bytes_moves(
    mesh_workload: Workload, checkpoints: Path
) -> None:
    """Prefilled elsewhere, which sends latents, and by decode itself."""

    async def main() -> None:
        async with open_mesh(checkpoints, checkpoint="deepseek") as mesh:
            requests = without_eos(mesh_workload)
            workers = [await mesh.prefill("p0"), await mesh.decode("d0")]
            remote = await run_all(mesh, [await mesh.router(workers, max_local_tokens=ALWAYS_REMOTE)], requests)
            local = await run_all(mesh, [await mesh.router([await mesh.decode("d1")])], requests)
            for replies, prefill in ((remote, "p0"), (local, "")):
                check(mesh_workload.baseline, replies)
                assert {reply.timing.prefill_worker_id for reply in replies.values()} == {prefill}
            moved = sum(reply.timing.kv_blocks for reply in remote.values())
            assert moved > 0
            kv_bytes = sum(reply.timing.kv_bytes for reply in remote.values())
            assert kv_bytes == moved * 3 * BLOCK_SIZE * (32 + 16) * 4  # layers, tokens, the latent and the rotated key, fp32
            assert 8 * kv_bytes <= moved * 3 * BLOCK_SIZE * 8 * (24 + 16 + 16) * 4  # of 8 heads: both parts of the key, the value

    asyncio.run(main())


@each_kind
def test_tokens_when_decode_computes_the_prompt_are_those_of_one_engine(mesh_workload: Workload, checkpoints: Path) -> None:
    async def main() -> None:
        async with open_mesh(checkpoints) as mesh:
            router = await mesh.router([await mesh.decode("d0"), await mesh.decode("d1")])
            replies = await run_all(mesh, [router], without_eos(mesh_workload))
            check(mesh_workload.baseline, replies)
            assert {reply.timing.prefill_worker_id for reply in replies.values()} == {""}
            assert await check_moved(mesh, router, replies) == 0

    asyncio.run(main())


@each_kind
def test_tokens_when_prefixes_are_warm_are_those_of_one_engine(mesh_workload: Workload, checkpoints: Path) -> None:
    """Cold; then warm on prefill alone, on both, and on decode alone. Which worker is warm is decided by which router knows it."""

    async def main() -> None:
        async with open_mesh(checkpoints) as mesh:
            prefill, other_prefill = await mesh.prefill("p0"), await mesh.prefill("p1")
            decode, other_decode = await mesh.decode("d0"), await mesh.decode("d1")
            requests = without_eos(mesh_workload)

            async def run(*workers: str) -> dict[str, Reply]:
                router = await mesh.router(workers, max_local_tokens=ALWAYS_REMOTE)
                replies = await run_all(mesh, [router], requests)
                check(mesh_workload.baseline, replies)
                await check_moved(mesh, router, replies)
                return replies

            def usable(request: EngineRequest) -> int:
                return (len(request.prompt_token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE

            def cached(replies: dict[str, Reply]) -> tuple[set[bool], set[bool]]:
                """Whether all that could be cached was: on prefill, on decode."""
                timings = [(request, replies[request.request_id].timing) for request in requests if usable(request)]
                return (
                    {timing.prefill_cached_tokens == usable(request) for request, timing in timings},
                    {timing.decode_cached_tokens == usable(request) for request, timing in timings},
                )

            await run(prefill, decode)
            assert cached(await run(prefill, other_decode))[0] == {True}
            on_both = await run(prefill, decode)
            assert cached(on_both) == ({True}, {True})
            # Only the last block of each prompt moves then: the one that somebody had to compute.
            assert {reply.timing.kv_blocks for reply in on_both.values()} == {1}
            on_decode = await run(other_prefill, decode)
            assert cached(on_decode)[1] == {True}
            assert sum(reply.timing.prefill_cached_tokens for reply in on_decode.values()) < sum(
                reply.timing.prefill_cached_tokens for reply in on_both.values()
            )

    asyncio.run(main())


@each_kind
def test_tokens_when_pools_differ_and_are_short_are_those_of_one_engine(mesh_workload: Workload, checkpoints: Path) -> None:
    """A prefill pool of 40 blocks, decode pools of 48 and 300: evictions, preemptions and waiting for room, and block ids never agree."""

    async def main() -> None:
        async with open_mesh(checkpoints) as mesh:
            workers = [
                await mesh.prefill("p0", kv_memory_bytes=40 * BLOCK_BYTES),
                await mesh.decode("d0", kv_memory_bytes=48 * BLOCK_BYTES),
                await mesh.decode("d1", kv_memory_bytes=300 * BLOCK_BYTES),
            ]
            router = await mesh.router(workers, max_local_tokens=ALWAYS_REMOTE)
            replies = await run_all(mesh, [router], without_eos(mesh_workload))
            check(mesh_workload.baseline, replies)
            await check_moved(mesh, router, replies)
            loads = await mesh.loads(router)
            assert {worker: load.blocks_total for worker, load in loads.items()} == {"p0": 40, "d0": 48, "d1": 300}
            assert {reply.timing.decode_worker_id for reply in replies.values()} == {"d0", "d1"}

    asyncio.run(main())


@each_kind
def test_tokens_when_two_routers_share_the_workers_are_those_of_one_engine(mesh_workload: Workload, checkpoints: Path) -> None:
    async def main() -> None:
        async with open_mesh(checkpoints) as mesh:
            workers = [await mesh.prefill("p0"), await mesh.decode("d0"), await mesh.decode("d1")]
            routers = [
                await mesh.router(workers, router_id=name, max_local_tokens=limit) for name, limit in (("r0", ALWAYS_REMOTE), ("r1", 64))
            ]
            replies = await run_all(mesh, routers, without_eos(mesh_workload))
            check(mesh_workload.baseline, replies)
            assert {reply.timing.router_id for reply in replies.values()} == {"r0", "r1"}
            assert {bool(reply.timing.prefill_worker_id) for reply in replies.values()} == {True, False}
            await check_moved(mesh, routers[0], replies)

    asyncio.run(main())


def test_choices_when_n_is_three_are_those_of_one_engine(load_workload: Callable[[str], Workload], checkpoints: Path) -> None:
    """Choices share one prefill; each is the request that its derived seed gives alone, here and with the prompt computed on decode."""

    async def main() -> None:
        async with open_mesh(checkpoints) as mesh:
            workers = [await mesh.prefill("p0"), await mesh.decode("d0")]
            remote = await mesh.router(workers, max_local_tokens=ALWAYS_REMOTE)
            local = await mesh.router(workers[1:])
            sampling = SamplingParams(seed=11, n=3, max_tokens=24, ignore_eos=True, logprobs=2)
            prompt = list(range(20, 70))
            replies = [await mesh.generate(router, prompt, sampling) for router in (remote, local, remote)]
            assert replies[0].tokens == replies[1].tokens == replies[2].tokens
            # The third finds its prompt cached, which is summed in another order: the same up to rounding.
            for cold, warm in zip(chain(*replies[0].logprobs), chain(*replies[2].logprobs), strict=True):
                assert warm.top_token_ids == cold.top_token_ids
                assert [warm.chosen, *warm.top_logprobs] == pytest.approx([cold.chosen, *cold.top_logprobs], abs=1e-4)
            assert all(len(tokens) == 24 for tokens in replies[0].tokens)
            assert len({tuple(tokens) for tokens in replies[0].tokens}) == 3
            assert [bool(reply.timing.prefill_worker_id) for reply in replies] == [True, False, True]
            await mesh.loads(local)

    asyncio.run(main())
