"""Results with everything in them, made from a seed: requests that queue before a few servers, with stages, tenants, hits and a fault."""

import heapq
from typing import Any

import msgspec
import numpy as np

from loadtest.ceilings import Ceilings
from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.result import Cluster, FaultMark, Result, ScheduleFacts
from loadtest.summary import summarize
from loadtest.verdict import verdict

OBJECTIVE = Objective(ttft_s=0.4, tpot_s=0.022)


def made_records(*, seed: int = 1, requests: int = 600, slowdown: float = 1.0) -> list[RequestRecord]:
    """The schedule is the same for every seed; `seed` decides how the server fared, `slowdown` how fast it is."""
    plan, fate = np.random.default_rng(0), np.random.default_rng(seed)
    at_s = np.cumsum(plan.exponential(0.05, requests)).tolist()
    inputs, outputs = plan.integers(100, 4000, requests).tolist(), plan.integers(2, 60, requests).tolist()
    tenants = plan.choice(["acme", "globex", "initech"], requests).tolist()
    free_s = [0.0, 0.0, 0.0]
    records = []
    for index in range(requests):
        record = RequestRecord(
            index=index,
            at_s=at_s[index],
            sent_s=at_s[index] + 0.0003,
            tenant=tenants[index],
            input_tokens=inputs[index],
            planned_tokens=outputs[index],
        )
        serve(record, free_s, fate, slowdown)
        records.append(record)
    return records


def serve(record: RequestRecord, free_s: list[float], fate: np.random.Generator, slowdown: float) -> None:
    """Gives the record what a server of three prefill workers would have made of it."""
    if record.index % 97 == 50:
        record.outcome, record.error, record.finished_s = Outcome.REFUSED, "RESOURCE_EXHAUSTED: the queue is full", record.at_s + 0.01
        return
    record.cached_tokens = int(record.input_tokens * fate.uniform(0, 0.6)) // 64 * 64
    record.prefill_cached_tokens = record.cached_tokens * 3 // 4
    record.decode_cached_tokens = record.cached_tokens - record.prefill_cached_tokens
    prefill_s = slowdown * (0.03 + (record.input_tokens - record.cached_tokens) * 6e-5) * fate.uniform(0.9, 1.1)
    gaps_s = fate.gamma(20, slowdown * 0.02 / 20, record.planned_tokens - 1)
    start_s = record.at_s + 0.0012
    queue_s = max(0.0, heapq.heappop(free_s) - start_s)
    heapq.heappush(free_s, start_s + queue_s + prefill_s)
    record.stages = {
        "request_hop": 0.0008,
        "route": 0.0004,
        "prefill_queue": queue_s,
        "prefill": prefill_s,
        "transfer_tail": 0.004 * slowdown,
        "first_token_return": 0.0008,
        "first_response_hop": 0.0006,
        "decode": float(gaps_s.sum()) + 0.0006,
        "finish": 0.0004,
        "fresh_stage": 0.001,  # as from a newer server
    }
    record.outcome, record.output_tokens = Outcome.COMPLETED, record.planned_tokens
    record.first_token_s = record.at_s + 0.0026 + queue_s + prefill_s + 0.004 * slowdown
    record.last_token_s = record.first_token_s + float(gaps_s.sum())
    record.finished_s = record.last_token_s + 0.0014
    record.gaps_s = gaps_s.tolist()
    record.kv_blocks, record.kv_bytes = record.input_tokens // 64, record.input_tokens // 64 * 131072
    record.prefill_worker_id, record.decode_worker_id = f"prefill-{record.index % 3}", f"decode-{record.index % 2}"


def made_result(records: list[RequestRecord], *, digest: str = "6f1e" * 16, name: str = "made up", **changes: Any) -> Result:
    """A result of these records, with everything that a result can have."""
    duration_s = max((record.at_s for record in records), default=0.0)
    expected = sum(record.kv_bytes for record in records)
    result = Result(
        kind="run",
        name=name,
        created="2026-01-02T03:04:05+00:00",
        command=("python", "-m", "loadtest", "run", "schedule.jsonl"),
        baton="0.1.0",
        commit="0123456789ab",
        machine="x86_64, Linux",
        schedule=ScheduleFacts(source="made up", digest=digest, seed=0, requests=len(records), duration_s=duration_s, block_size=64),
        cluster=Cluster(target="localhost:50051", model="tiny", prefill_workers=3, decode_workers=2, blocks_per_worker=2000, block_size=64),
        objective=OBJECTIVE,
        verdict=verdict(records, OBJECTIVE),
        summary=summarize(records, objective=OBJECTIVE, duration_s=duration_s, num_workers=5, kv_bytes_expected=expected),
        ceilings=Ceilings(infinite=0.41, one_pool=0.36, round_robin=0.11),
        faults=(FaultMark(at_s=12.0, kind="kill", worker_id="decode-1", detected_s=0.4, recovered_s=3.2),),
        extra={
            "probes": [
                {"rate": 5.0, "attainment": 1.0, "low": 0.98, "high": 1.0, "n": 300},
                {"rate": 10.0, "attainment": 0.97, "low": 0.95, "high": 0.98, "n": 600},
                {"rate": 20.0, "attainment": 0.4, "low": 0.37, "high": 0.43, "n": 1200},
            ]
        },
    )
    return msgspec.structs.replace(result, **changes)
