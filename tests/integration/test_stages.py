"""The stages of requests on a real mesh add up to what their clients measure."""

import asyncio
import contextlib
import http.client
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from loadtest.stages import E2E_STAGES, STAGES, TTFT_STAGES, residual_s, stages_of, tolerance_s
from protos.baton.v1 import inference_pb2
from services.core.types import SamplingParams
from services.mesh import convert, failpoints
from tests.mesh import Mesh

NUM_AT_ONCE = 4
OUTPUT_TOKENS = 12
PROMPT_TOKENS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One request: the mesh's record, the client's clock."""

    timing: inference_pb2.RequestTiming
    stages: dict[str, float]
    ttft_s: float
    e2e_s: float

    @property
    def residuals_s(self) -> tuple[float, float]:
        return residual_s(self.stages, TTFT_STAGES, self.ttft_s), residual_s(self.stages, E2E_STAGES, self.e2e_s)


async def ask(mesh: Mesh, router: str, prompt: Sequence[int], *, n: int = 1) -> Measured:
    """Sends one request; its two times are the client's monotonic ones, the stamps its wall clock's."""
    request = inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(token_ids=convert.token_ids_to_proto(prompt)),
        sampling=convert.sampling_to_proto(SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, n=n)),
        include_timing=True,
    )
    timing = None
    first_s = first_unix_s = 0.0
    sent_unix_s, started = time.time(), time.perf_counter()
    async for response in mesh.stub(router).Generate(request):
        if not first_s:
            first_s, first_unix_s = time.perf_counter() - started, time.time()
        if response.HasField("timing"):
            timing = response.timing
    done_unix_s, done_s = time.time(), time.perf_counter() - started
    assert timing is not None
    stages = stages_of(timing, client_sent_unix_s=sent_unix_s, client_first_unix_s=first_unix_s, client_done_unix_s=done_unix_s)
    return Measured(timing=timing, stages=stages, ttft_s=first_s, e2e_s=done_s)


def ask_http(address: str, prompt: Sequence[int]) -> Measured:
    """The same over HTTP, as events; blocks."""
    body = {"prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True, "baton_timing": True}
    with contextlib.closing(http.client.HTTPConnection(address)) as connection:
        record = None
        first_s = first_unix_s = 0.0
        sent_unix_s, started = time.time(), time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                if not first_s:
                    first_s, first_unix_s = time.perf_counter() - started, time.time()
                record = json.loads(line.removeprefix(b"data: ")).get("baton", record)
        done_unix_s, done_s = time.time(), time.perf_counter() - started
    assert record is not None
    (timing,) = record["timings"]
    stages = stages_of(timing, client_sent_unix_s=sent_unix_s, client_first_unix_s=first_unix_s, client_done_unix_s=done_unix_s)
    return Measured(timing=inference_pb2.RequestTiming(**timing), stages=stages, ttft_s=first_s, e2e_s=done_s)


def prompt(index: int) -> list[int]:
    """No two of them begin alike."""
    return [1000 + index, *((7 * place + index) % 1000 + 5 for place in range(PROMPT_TOKENS - 1))]


async def ask_all(mesh: Mesh, router: str, *, num_requests: int) -> list[Measured]:
    """Half of the requests one by one, half several at once."""
    one_by_one = [await ask(mesh, router, prompt(index)) for index in range(num_requests // 2)]
    places = asyncio.Semaphore(NUM_AT_ONCE)

    async def in_turn(index: int) -> Measured:
        async with places:
            return await ask(mesh, router, prompt(index))

    return one_by_one + await asyncio.gather(*(in_turn(index) for index in range(num_requests // 2, num_requests)))


def check(measured: Sequence[Measured], what: str) -> None:
    """Nothing negative on one host; sums within tolerance for 95 % (the machine is busy with tests), and no hole that all have."""
    for stage in STAGES:
        values = [each.stages[stage.name] for each in measured]
        print(f"{what:8} {stage.name:22} p50 {statistics.median(values) * 1e3:8.3f} ms, most {max(values) * 1e3:8.3f} ms")
        assert min(values) >= 0.0, stage
    for position, name in enumerate(("TTFT", "E2E")):
        residuals = sorted(each.residuals_s[position] for each in measured)
        times = [(each.ttft_s, each.e2e_s)[position] for each in measured]
        print(
            f"{what:8} {name} p50 {statistics.median(times) * 1e3:.1f} ms; residual least {residuals[0] * 1e6:.0f} µs,"
            f" p50 {statistics.median(residuals) * 1e6:.0f} µs, most {residuals[-1] * 1e6:.0f} µs"
        )
        within = [abs(each.residuals_s[position]) <= tolerance_s(time_s) for each, time_s in zip(measured, times, strict=True)]
        assert len(within) - sum(within) <= max(2, 0.05 * len(within)), name
        assert abs(statistics.median(residuals)) < 0.00005, name


@pytest.mark.parametrize(("transport", "num_requests"), [("shm", 40), ("grpc", 12)])
def test_stages_when_prefill_computes_the_prompt_add_up_to_the_client_s_times(transport: str, num_requests: int) -> None:
    async def main() -> None:
        async with Mesh("demo", kv_transports=(transport,)) as mesh:
            router = await mesh.router([await mesh.prefill("p0"), await mesh.decode("d0")], max_local_tokens=0)
            measured = await ask_all(mesh, router, num_requests=num_requests)
            await mesh.loads(router)
        assert {each.timing.prefill_worker_id for each in measured} == {"p0"}
        assert {each.timing.prefill_attempts for each in measured} == {1}
        assert {each.timing.steps for each in measured} <= set(range(2, OUTPUT_TOKENS + 1))
        assert min(min(each.stages["to_prefill"], each.stages["prefill_return"]) for each in measured) > 0.0
        check(measured, transport)

    asyncio.run(main())


def test_stages_when_decode_is_alone_add_up_to_the_client_s_times() -> None:
    async def main() -> None:
        async with Mesh("demo") as mesh:
            router = await mesh.router([await mesh.decode("d0")])
            measured = await ask_all(mesh, router, num_requests=20)
            await mesh.loads(router)
        assert {each.stages["prefill_queue"] + each.stages["transfer_tail"] for each in measured} == {0.0}
        check(measured, "alone")

    asyncio.run(main())


def test_stages_when_there_are_choices_or_the_client_speaks_http_add_up_to_its_times() -> None:
    async def main() -> None:
        async with Mesh("demo") as mesh:
            workers = [await mesh.prefill("p0"), await mesh.decode("d0")]
            router = await mesh.router(workers, max_local_tokens=0, http=True)
            choices = [await ask(mesh, router, prompt(index), n=3) for index in range(6)]
            spoken = [await asyncio.to_thread(ask_http, mesh.http_address(router), prompt(index)) for index in range(10, 16)]
            await mesh.loads(router)
        assert {each.timing.prefill_worker_id for each in choices + spoken} == {"p0"}
        check(choices, "n = 3")
        check(spoken, "http")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("point", "armed", "lost_in", "prefill_attempts"),
    [
        ("decode.started", "error", "retry", 1),
        ("prefill.mid_prefill", "error", "prefill_retry", 2),
        ("router.mid_decode", "error@2", "decode_retry", 1),  # a busy machine tells several tokens at once
    ],
)
def test_stages_when_a_worker_fails_add_up_and_name_what_was_lost(
    point: str, armed: str, lost_in: str, prefill_attempts: int, tmp_path: Path
) -> None:
    async def main() -> None:
        async with Mesh("demo") as mesh:
            workers = [await mesh.prefill("p0"), await mesh.prefill("p1"), await mesh.decode("d0"), await mesh.decode("d1")]
            router = await mesh.router(workers, max_local_tokens=0)
            measured = []
            for index in range(6):
                (tmp_path / point).write_text(armed)
                measured.append(await ask(mesh, router, prompt(index)))
                assert not (tmp_path / point).exists(), "did not strike"
            await mesh.loads(router)
        retries = [name for name in ("retry", "prefill_retry", "decode_retry") if any(each.stages[name] for each in measured)]
        assert retries == [lost_in]
        assert min(each.stages[lost_in] for each in measured) > 0.0
        assert {each.timing.prefill_attempts for each in measured} == {prefill_attempts}
        check(measured, lost_in)

    failpoints.enable(tmp_path)
    try:
        asyncio.run(main())
    finally:
        failpoints.enable(None)


def test_stages_when_every_prefill_worker_fails_add_up_to_the_client_s_times(tmp_path: Path) -> None:
    """Decode computes the prompt after all: it waits for its own engine then."""

    async def main() -> None:
        async with Mesh("demo") as mesh:
            router = await mesh.router([await mesh.prefill("p0"), await mesh.decode("d0")], max_local_tokens=0)
            measured = []
            for index in range(6):
                (tmp_path / "prefill.accepted").write_text("error")
                measured.append(await ask(mesh, router, prompt(index)))
            await mesh.loads(router)
        assert {each.timing.prefill_worker_id for each in measured} == {""}
        assert min(min(each.stages["prefill_retry"], each.stages["prefill_queue"]) for each in measured) > 0.0
        check(measured, "fallback")

    failpoints.enable(tmp_path)
    try:
        asyncio.run(main())
    finally:
        failpoints.enable(None)
