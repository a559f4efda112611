"""Routing on a mesh that runs: slow workers, hot prefixes, an index that says what is not so. The policy alone: tests/unit/router."""

import asyncio
import contextvars
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from protos.baton.v1 import inference_pb2
from services.core.prefix_hash import chain_hashes, pack_tokens, prefix_key
from services.core.types import SamplingParams
from services.engine.loader import load_model
from services.mesh.index_client import IndexPublisher
from tests.mesh import Mesh, Reply
from tests.unit.mesh.index_serving import serving_index
from tests.waiting import wait_until

BLOCK_SIZE = 16
OUTPUT_TOKENS = 8
SAMPLING = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)

# Seconds of a step, of each sequence in it and of each token: several times what the tiny engines take that share this process.
STEP_S, SEQUENCE_S, TOKEN_S = 0.015, 0.0005, 0.00005

_slowness: contextvars.ContextVar[float] = contextvars.ContextVar("slowness", default=1.0)


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take the time of a processor of one's own, whatever the machine does; times `_slowness` where a worker was started with it."""

    def load_paced(*args: Any, **kwargs: Any) -> Any:
        slowness = _slowness.get()
        loaded = load_model(*args, **kwargs)
        runner: Any = loaded.core._runner
        execute = runner.execute

        def paced_execute(batch: Any, samples: Any, scores: Any = ()) -> Any:
            ends_at = time.perf_counter() + slowness * (STEP_S + SEQUENCE_S * len(batch.query_lens) + TOKEN_S * sum(batch.query_lens))
            result = execute(batch, samples, scores)
            time.sleep(max(0.0, ends_at - time.perf_counter()))
            return result

        runner.execute = paced_execute
        return loaded

    monkeypatch.setattr("services.worker.runtime.load_model", load_paced)


async def run_in_turn(
    mesh: Mesh, router: str, prompts: list[list[int]], *, at_once: int, sampling: SamplingParams = SAMPLING
) -> list[Reply]:
    """The prompts in order, so many at once; replies in the order in which they began."""
    places = asyncio.Semaphore(at_once)

    async def run(prompt: list[int]) -> Reply:
        async with places:
            return await mesh.generate(router, prompt, sampling)

    return await asyncio.gather(*(run(prompt) for prompt in prompts))


async def once_in_three(traffic: Callable[[], Awaitable[Counter[str]]], is_fair: Callable[[Counter[str]], bool]) -> None:
    """Three routers that know nothing yet send the traffic, until one has shared it out as it should.

    A machine that is busy with something else holds a worker up for longer than its steps are paced at, and a router is right to send
    such a worker less: what it does to workers that are equal shows only when they were.
    """
    seen = []
    for _ in range(3):
        seen.append(await traffic())
        if is_fair(seen[-1]):
            return
    raise AssertionError(seen)


def prompts(count: int, length: int, *, prefix: list[int] | None = None) -> list[list[int]]:
    """Prompts that have nothing in common but the prefix."""
    return [(prefix or []) + [(7 * index + 13 * position + 1) % 380 for position in range(length)] for index in range(count)]


@pytest.mark.usefixtures("paced")
def test_decode_worker_when_it_is_three_times_slower_loses_traffic_within_fifty_requests(checkpoints: Path) -> None:
    """Two of three workers are equal, one is slowed: of the hundred requests after the first fifty it gets less than its third."""

    async def main() -> None:
        async with Mesh(checkpoints / "llama3", dtype="float32", max_model_len=512) as mesh:
            workers = [await mesh.decode("d0"), await mesh.decode("d1")]
            token = _slowness.set(3.0)
            workers.append(await mesh.decode("slow"))
            _slowness.reset(token)
            sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)

            async def traffic() -> Counter[str]:
                router = await mesh.router(workers)
                await run_in_turn(mesh, router, prompts(50, 40), at_once=6, sampling=sampling)
                replies = await run_in_turn(mesh, router, prompts(150, 40)[50:], at_once=6, sampling=sampling)
                return Counter(reply.timing.decode_worker_id for reply in replies)

            await once_in_three(traffic, lambda counts: counts["slow"] < 0.7 * 100 / 3 and counts["slow"] < min(counts["d0"], counts["d1"]))

    asyncio.run(main())


@pytest.mark.usefixtures("paced")
def test_hot_prefix_when_all_requests_have_it_does_not_pile_up_on_one_worker(checkpoints: Path) -> None:
    """200 requests with one prefix of eight blocks, 16 at once, over four decode workers that publish what they hold: max/mean ≤ 1.3."""

    async def main() -> None:
        async with serving_index() as index, Mesh(checkpoints / "llama3", dtype="float32", max_model_len=512) as mesh:
            workers = [await mesh.decode(f"d{number}", kv_index=(index.address,)) for number in range(4)]
            prefix = list(range(100, 100 + 8 * BLOCK_SIZE))

            async def traffic() -> Counter[str]:
                router = await mesh.router(workers, kv_index=(index.address,))
                await mesh.wait_for(router, lambda status: status.index_synchronized)
                replies = await run_in_turn(mesh, router, prompts(200, 30, prefix=prefix), at_once=16)
                # Wherever it goes the prefix is used: hardly anybody computes it again.
                assert sum(reply.timing.decode_cached_tokens >= len(prefix) for reply in replies) > 0.8 * len(replies)
                return Counter(reply.timing.decode_worker_id for reply in replies)

            await once_in_three(traffic, lambda counts: max(counts.values()) <= 1.3 * 200 / 4)

    asyncio.run(main())


def test_prefix_when_one_worker_has_it_is_found_by_a_router_that_did_not_send_it(checkpoints: Path) -> None:
    async def main() -> None:
        async with serving_index() as index, Mesh(checkpoints / "llama3", dtype="float32", max_model_len=512) as mesh:
            workers = [await mesh.decode(f"d{number}", kv_index=(index.address,)) for number in range(3)]
            routers = [await mesh.router(workers, kv_index=(index.address,), router_id=f"r{number}") for number in range(2)]
            prompt = list(range(20, 20 + 10 * BLOCK_SIZE))
            first = await mesh.generate(routers[0], prompt, SAMPLING)
            num_blocks = (len(prompt) + OUTPUT_TOKENS - 1) // BLOCK_SIZE
            await mesh.wait_for(routers[1], lambda status: status.index_entries >= num_blocks)
            second = await mesh.generate(routers[1], prompt, SAMPLING)
            assert second.timing.decode_worker_id == first.timing.decode_worker_id
            assert second.timing.predicted_cached_tokens == second.timing.decode_cached_tokens == 9 * BLOCK_SIZE
            assert second.tokens == first.tokens

    asyncio.run(main())


def test_stale_owner_when_a_request_has_met_it_is_not_believed_again(checkpoints: Path) -> None:
    """The index says that d1 holds a prompt which it never saw: one request goes there in vain, the next one knows better."""

    async def main() -> None:
        async with serving_index() as index, Mesh(checkpoints / "llama3", dtype="float32", max_model_len=512) as mesh:
            workers = [await mesh.decode("d0"), await mesh.decode("d1")]
            router = await mesh.router(workers, kv_index=(index.address,))
            models = await mesh.stub(router).ListModels(inference_pb2.ListModelsRequest())
            prompt = list(range(20, 20 + 16 * BLOCK_SIZE))
            key = prefix_key(model_fingerprint=models.models[0].model_fingerprint)
            hashes = chain_hashes(key, pack_tokens(prompt), BLOCK_SIZE)
            async with IndexPublisher((index.address,), worker_id="d1", epoch=1) as liar:
                liar.publish_nowait(stored=hashes)
                await mesh.wait_for(router, lambda status: status.index_entries == len(hashes))
                believed = await mesh.generate(router, prompt, SAMPLING)
                assert believed.timing.decode_worker_id == "d1"
                assert believed.timing.predicted_cached_tokens == 15 * BLOCK_SIZE
                assert believed.timing.decode_cached_tokens == 0
                again = await mesh.generate(router, prompt, SAMPLING)
                assert again.timing.predicted_cached_tokens == 0
                assert again.tokens == believed.tokens

    asyncio.run(main())


def test_worker_when_it_restarts_is_met_again_with_an_empty_cache(checkpoints: Path) -> None:
    """What the old start of a worker held is not expected of the new one, two seconds after it has come back."""

    async def main() -> None:
        async with serving_index() as index, Mesh(checkpoints / "llama3", dtype="float32", max_model_len=512) as mesh:
            worker = await mesh.decode("d0", kv_index=(index.address,))
            router = await mesh.router([worker], kv_index=(index.address,))
            prompt = list(range(20, 20 + 10 * BLOCK_SIZE))
            await mesh.generate(router, prompt, SAMPLING)
            before = await mesh.wait_for(router, lambda status: status.index_entries > 0)
            address = worker.rpartition("@")[2]
            await mesh.stop("d0")
            await mesh.decode("d0", kv_index=(index.address,), address=address)
            back = await mesh.wait_for(router, lambda status: status.workers[0].state == "up")
            assert back.workers[0].worker.epoch > before.workers[0].worker.epoch
            await wait_until(lambda: is_empty(mesh, router), timeout_s=2.0)
            reply = await mesh.generate(router, prompt, SAMPLING)
            assert reply.timing.predicted_cached_tokens == reply.timing.decode_cached_tokens == 0

    asyncio.run(main())


async def is_empty(mesh: Mesh, router: str) -> bool:
    return (await mesh.status(router)).index_entries == 0
