"""`micro overload`: goodput at 0.5, 1, 2 and 4 times what a mesh can do, by clients that come whether or not it keeps up.

Capacity is what a closed loop gets through. Then requests arrive at random (Poisson) at each multiple of it; one is good when all its
tokens came, the first within the objective and the others at their pace. The rest must have been refused early, with a retry delay.
"""

import asyncio
import contextlib
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.micro.figure import Figure
from loadtest.micro.http_client import Reply, complete, request_body
from loadtest.micro.processes import free_port, service, wait_for_workers

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 32
TTFT_SLO_S, TPOT_SLO_S = 1.0, 0.15
MULTIPLES = (0.5, 1.0, 2.0, 4.0)
CLOSED_LOOP, CLOSED_LOOP_REQUESTS = 48, 240
SECONDS = 15.0  # of arrivals at each multiple
DRAIN_S = 10.0
FIRST_WORD, VOCAB_SIZE = 300, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What came of one multiple; rates are per second of arrivals."""

    offered: float
    good: float
    refused: float
    late: float
    failed: float
    refusal_ms: float


def measure(*, runs: int) -> tuple[list[Figure], dict[str, object]]:
    """Goodput at each multiple, what was refused, and how fast."""
    http = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        prefill = stack.enter_context(service("prefill", worker_id="prefill-0"))
        decode = stack.enter_context(service("decode", worker_id="decode-0"))
        workers = f"prefill=prefill-0@{prefill.address},decode=decode-0@{decode.address}"
        router = stack.enter_context(service("router", workers=workers, http_listen=http, served_model_name="m", ttft_slo_s=TTFT_SLO_S))
        asyncio.run(wait_for_workers(router.address, 2))
        asyncio.run(_closed_loop(http))  # warm up: also what the router learns of its workers
        capacities, loads = [], {multiple: list[Load]() for multiple in MULTIPLES}
        for _ in range(runs):
            capacities.append(asyncio.run(_closed_loop(http)))
            for multiple in MULTIPLES:
                loads[multiple].append(asyncio.run(_open_loop(http, multiple * capacities[-1])))
    return _figures(capacities, loads, runs), {
        "prompt tokens": PROMPT_TOKENS,
        "output tokens": OUTPUT_TOKENS,
        "objective": f"TTFT {TTFT_SLO_S} s, {TPOT_SLO_S * 1e3:.0f} ms per token",
        "cores": os.cpu_count(),
    }


def _figures(capacities: Sequence[float], loads: dict[float, list[Load]], runs: int) -> list[Figure]:
    figures = [Figure(name="closed loop", value=statistics.median(capacities), unit="requests/s", runs=runs)]
    peak = max(statistics.median(load.good for load in some) for some in loads.values())
    for multiple, some in loads.items():
        figures.append(
            Figure(
                name=f"goodput at {multiple:g}× capacity",
                value=statistics.median(load.good for load in some),
                unit="requests/s",
                runs=runs,
                reference=peak,
                reference_name="its peak",
                target=0.9 if multiple == 2.0 else None,
            )
        )
        for title, attribute in (("offered", "offered"), ("refused with a retry delay", "refused"), ("late", "late"), ("failed", "failed")):
            value = statistics.median(getattr(load, attribute) for load in some)
            target = 0.0 if attribute == "failed" else None
            figures.append(
                Figure(name=f"  {title}", value=value, unit="requests/s", runs=runs, target=target, at_most=True, on_ratio=False)
            )
        figures.append(Figure(name="  a refusal took", value=statistics.median(load.refusal_ms for load in some), unit="ms", runs=runs))
    return figures


async def _closed_loop(address: str) -> float:
    """Requests finished per second when the next one comes as one ends; a refused one comes again when it was told to."""
    bodies = iter([_body() for _ in range(CLOSED_LOOP_REQUESTS)])
    started = time.perf_counter()

    async def client() -> None:
        for body in bodies:
            reply = await complete(address, body)
            while reply.retry_after_s is not None:
                await asyncio.sleep(reply.retry_after_s)
                reply = await complete(address, body)
            if reply.tokens != OUTPUT_TOKENS:
                raise RuntimeError(f"a request gave {reply.tokens} tokens: {reply.status} {reply.error}")

    await asyncio.gather(*[client() for _ in range(CLOSED_LOOP)])
    return CLOSED_LOOP_REQUESTS / (time.perf_counter() - started)


async def _open_loop(address: str, rate: float) -> Load:
    """Requests at random moments, as many per second on average, whatever becomes of them."""
    moments, now = [], 0.0
    while (now := now + random.expovariate(rate)) < SECONDS:
        moments.append(now)
    bodies = [_body() for _ in moments]  # before the clock runs
    started = time.perf_counter()

    async def client(moment: float, body: bytes) -> tuple[Reply, float]:
        await asyncio.sleep(started + moment - time.perf_counter())
        sent_late_s = time.perf_counter() - started - moment
        return await complete(address, body), sent_late_s

    async with asyncio.timeout(SECONDS + DRAIN_S + TTFT_SLO_S + OUTPUT_TOKENS * TPOT_SLO_S):
        replies = await asyncio.gather(*[client(moment, body) for moment, body in zip(moments, bodies, strict=True)])
    refused = [reply for reply, _ in replies if reply.status in (429, 503) and reply.retry_after_s is not None]
    finished = [(reply, late_s) for reply, late_s in replies if reply.tokens == OUTPUT_TOKENS and not reply.error]
    good = [reply for reply, late_s in finished if late_s + reply.ttft_s <= TTFT_SLO_S and reply.tpot_s <= TPOT_SLO_S]
    return Load(
        offered=len(replies) / SECONDS,
        good=len(good) / SECONDS,
        refused=len(refused) / SECONDS,
        late=(len(finished) - len(good)) / SECONDS,
        failed=(len(replies) - len(finished) - len(refused)) / SECONDS,
        refusal_ms=statistics.median([reply.total_s for reply in refused] or [0.0]) * 1e3,
    )


def _body() -> bytes:
    return request_body([random.randrange(FIRST_WORD, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)], OUTPUT_TOKENS, model="m")
