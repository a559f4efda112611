"""`micro mesh-overhead`: how much of the time to a first token is not the model, on an idle mesh of real processes.

From the timing record of each request: TTFT at the router minus the time inside the model for its prompt. Everything else is the mesh:
tokenizing, routing, queues, hand-over between processes, scheduling and sampling, moving KV blocks, frames. Beside it stands what gRPC
alone takes for the round trips that a request makes: a health check of each process that it passes.
"""

import asyncio
import contextlib
import os
import random
import statistics

from loadtest.micro.figure import Figure
from loadtest.micro.processes import health_check_ms, service, wait_for_workers
from loadtest.stages import STAGES
from protos.baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from services.mesh import convert
from services.mesh.client import open_channel

ELSEWHERE, ON_DECODE = "prefill elsewhere", "prompt computed on decode"
PROMPT_TOKENS = 256
OUTPUT_TOKENS = 8
WARM_UP = 5
REQUESTS_PER_RUN = 40
PAUSE_S = 0.02  # between requests: an idle mesh, not a busy one
FIRST_WORD, VOCAB_SIZE = 300, 4096


def measure(*, runs: int) -> tuple[list[Figure], dict[str, object]]:
    """Overheads of the two ways a prompt can take, and their stages."""
    overheads: dict[str, list[float]] = {way: [] for way in (ELSEWHERE, ON_DECODE)}
    calls: dict[str, list[float]] = {way: [] for way in (ELSEWHERE, ON_DECODE)}
    timings: dict[str, list[inference_pb2.RequestTiming]] = {way: [] for way in (ELSEWHERE, ON_DECODE)}
    with contextlib.ExitStack() as stack:
        prefill = stack.enter_context(service("prefill", worker_id="prefill-0"))
        decode = stack.enter_context(service("decode", worker_id="decode-0"))
        workers = {ELSEWHERE: f"prefill=prefill-0@{prefill.address},decode=decode-0@{decode.address}"}
        workers[ON_DECODE] = f"decode=decode-0@{decode.address}"
        routers = {way: stack.enter_context(service("router", workers=workers[way], max_local_tokens=0)) for way in workers}
        for way, router in routers.items():
            asyncio.run(wait_for_workers(router.address, workers[way].count("=")))
            asyncio.run(_run(router.address, WARM_UP))
        for _ in range(runs):
            for way, router in routers.items():
                made = asyncio.run(_run(router.address, REQUESTS_PER_RUN))
                timings[way] += made
                overheads[way].append(statistics.median(timing.ttft_s - timing.model_s for timing in made) * 1e3)
                crossed = (decode, prefill) if way == ELSEWHERE else (decode,)
                calls[way].append(sum(asyncio.run(health_check_ms(to.address, REQUESTS_PER_RUN, pause_s=PAUSE_S)) for to in crossed))
    figures = []
    for way in overheads:
        figures.append(
            Figure(
                name=f"outside the model until the first token, {way}",
                value=statistics.median(overheads[way]),
                unit="ms",
                runs=runs,
                reference=statistics.median(calls[way]),
                reference_name="health checks there and back",
                target=6.0,
                at_most=True,
                on_ratio=False,
            )
        )
        assert {bool(timing.prefill_worker_id) for timing in timings[way]} == {way == ELSEWHERE}
        # All that the router knows; the client's two ends are not among them.
        stages = [f"{stage.name}_s" for stage in STAGES if stage.in_ttft and hasattr(timings[way][0], f"{stage.name}_s")]
        for name in (*stages, "model_s", "ttft_s"):
            stage = statistics.median(getattr(timing, name) for timing in timings[way])
            figures.append(Figure(name=f"  {name.removesuffix('_s')}", value=stage * 1e3, unit="ms", runs=runs, on_ratio=False))
    return figures, {"prompt tokens": PROMPT_TOKENS, "requests per run": REQUESTS_PER_RUN, "cores": os.cpu_count()}


async def _run(address: str, count: int) -> list[inference_pb2.RequestTiming]:
    """One request after the other, all different."""
    timings = []
    async with open_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for _ in range(count):
            prompt = [random.randrange(FIRST_WORD, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]
            request = inference_pb2.GenerateRequest(
                prompt=inference_pb2.Prompt(token_ids=convert.token_ids_to_proto(prompt)),
                sampling=common_pb2.SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True),
                include_timing=True,
            )
            async for response in stub.Generate(request):
                if response.HasField("timing"):
                    timings.append(response.timing)
            await asyncio.sleep(PAUSE_S)
    return timings
