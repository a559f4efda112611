"""Law 3 across deaths: decode workers are killed while they decode, and clients get what one engine gives, as if nothing had happened.

The killed worker is a process of its own, the rest of the mesh runs here. That requests went on elsewhere after their first token is shown
by their own records.
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.core.types import FinishReason, SamplingParams
from tests.exactness.workloads import Workload
from tests.mesh import Mesh, Reply
from tests.parity.test_mesh_parity import ALWAYS_REMOTE, check, each_kind, mesh_workload, open_mesh, run_all, without_eos
from tests.waiting import wait_until

__all__ = ["mesh_workload"]  # the fixture

PROMPT = "import json\nimport os\n\n\ndef read_json(path):\n    "
LONG = SamplingParams(temperature=0.8, seed=11, max_tokens=300, ignore_eos=True)


async def output_tokens(mesh: Mesh, router: str) -> int:
    return (await mesh.status(router)).output_tokens


async def kill_after(mesh: Mesh, router: str, process: asyncio.subprocess.Process, num_tokens: int) -> None:
    """Kills a worker when the router has got this many more tokens."""
    start = await output_tokens(mesh, router)

    async def has_come() -> bool:
        return await output_tokens(mesh, router) >= start + num_tokens

    await wait_until(has_come)
    process.send_signal(signal.SIGKILL)
    await process.wait()


@each_kind
@pytest.mark.parametrize("max_local_tokens", [ALWAYS_REMOTE, None], ids=["remote", "by cost"])
def test_tokens_when_decode_workers_are_killed_are_those_of_one_engine(
    max_local_tokens: int | None, mesh_workload: Workload, checkpoints: Path
) -> None:
    async def main() -> None:
        async with asyncio.timeout(120), open_mesh(checkpoints) as mesh:
            mortal = [await mesh.spawn_decode(f"d{number}") for number in (1, 2)]
            workers = [await mesh.prefill("p0"), await mesh.decode("d0"), *[setting for setting, _ in mortal]]
            router = await mesh.router(workers, max_local_tokens=max_local_tokens)
            running = asyncio.ensure_future(run_all(mesh, [router], without_eos(mesh_workload)))
            for _, process in mortal:
                await kill_after(mesh, router, process, 2000)
            replies = await running
            check(mesh_workload.baseline, replies)
            assert sum(reply.timing.attempts > 1 for reply in replies.values()) >= 3, "requests went on elsewhere"
            loads = await mesh.loads(router)
            assert set(loads) >= {"p0", "d0"}
            assert all(load.blocks_free + load.blocks_cached == load.blocks_total for load in loads.values())

    asyncio.run(main())


async def with_and_without_death(mesh: Mesh, sampling: SamplingParams, **fields: Any) -> tuple[Reply, Reply]:
    """The same request over d1, and over d0, which is killed on the way, then d1."""
    quiet_router = await mesh.router([await mesh.decode("d1")])
    calm = await mesh.generate(quiet_router, PROMPT, sampling, **fields)
    setting, process = await mesh.spawn_decode("d0")
    router = await mesh.router([setting], recovery_s=100.0)  # beside other tests a start may take long
    disturbed = asyncio.ensure_future(mesh.generate(router, PROMPT, sampling, **fields))
    await kill_after(mesh, router, process, 40)
    await mesh.spawn_decode("d0", address=setting.rpartition("@")[2])
    reply = await disturbed
    assert reply.timing.attempts > 1
    return calm, reply


def run(test: Callable[[Mesh], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(150), Mesh("demo") as mesh:
            await test(mesh)

    asyncio.run(main())


def assert_same(calm: Reply, disturbed: Reply) -> None:
    assert disturbed.tokens == calm.tokens
    assert disturbed.texts == calm.texts
    assert disturbed.finish_reasons == calm.finish_reasons
    assert disturbed.usage == calm.usage


def test_reply_when_the_only_worker_dies_and_comes_back_is_the_same_with_its_logprobs() -> None:
    async def test(mesh: Mesh) -> None:
        calm, disturbed = await with_and_without_death(mesh, replace(LONG, logprobs=2, frequency_penalty=0.3, repetition_penalty=1.1))
        assert_same(calm, disturbed)
        assert len(disturbed.logprobs[0]) == 300
        for one, other in zip(calm.logprobs[0], disturbed.logprobs[0], strict=True):
            assert other.chosen == pytest.approx(one.chosen, abs=1e-4)
            assert list(other.top_token_ids) == list(one.top_token_ids)

    run(test)


def test_choices_when_their_worker_dies_go_on_each_from_where_it_was() -> None:
    async def test(mesh: Mesh) -> None:
        calm, disturbed = await with_and_without_death(mesh, replace(LONG, n=3, max_tokens=120))
        assert_same(calm, disturbed)
        assert len({tuple(tokens) for tokens in disturbed.tokens}) == 3

    run(test)


def test_stop_string_when_it_lies_across_the_death_ends_the_text_before_it() -> None:
    """The stop is the text's last ninety characters: some of the text comes before the death and some after it, wherever that falls."""

    async def test(mesh: Mesh) -> None:
        [text] = (await mesh.generate(await mesh.router([await mesh.decode("dx")]), PROMPT, LONG)).texts
        stop = text[-90:]
        calm, disturbed = await with_and_without_death(mesh, LONG, stop=[stop])
        assert_same(calm, disturbed)
        assert disturbed.texts == [text[: text.index(stop)]]
        assert disturbed.finish_reasons == [FinishReason.STOP]

    run(test)
