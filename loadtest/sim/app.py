"""`loadtest sim`: replays a trace before simulated workers and says what each request waited for."""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from loadtest.ceilings import Ceilings, ceilings
from loadtest.files import BadInput
from loadtest.metrics import distribution
from loadtest.sim.simulation import Policy, RouterModel, Simulation, simulate
from loadtest.sim.worker_model import declared, fitted
from loadtest.traces import mooncake

REPORT_FORMAT = "baton.sim/1"


DECLARED, FITTED = "declared", "fitted:"


def sim(
    trace: Annotated[Path, typer.Argument(help="A trace in Mooncake's JSON Lines, .gz or not.")],
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers; with none, decode workers do both phases.")] = 8,
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 8,
    policy: Annotated[Policy, typer.Option(help="Who chooses workers.")] = Policy.BATON,
    speedup: Annotated[float, typer.Option(min=1e-6, help="Arrivals come so many times as fast as recorded.")] = 1.0,
    worker_model: Annotated[
        str, typer.Option(help='How long steps take: "declared", or the file of `baton bench profile`, with "fitted:" before it or not.')
    ] = DECLARED,
    link_gbps: Annotated[
        float | None, typer.Option(min=1e-6, help="10^9 bits/s of each worker's link, each way; blocks travel in no time when not given.")
    ] = None,
    overhead_ms: Annotated[float, typer.Option(min=0.0, help="What calls and wake-ups add to a request before decode has it.")] = 0.0,
    router_model: Annotated[
        RouterModel, typer.Option(help="What the router knows of the workers' speed: it learns it, as it does in a mesh, or is told it.")
    ] = RouterModel.LEARNT,
    max_local_tokens: Annotated[
        int | None, typer.Option(min=0, help="Decode workers compute at most so many prompt tokens; as the router sees fit when not given.")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block in the trace, and of a KV block.")] = mooncake.BLOCK_SIZE,
    requests: Annotated[int | None, typer.Option(min=1, help="Only so many requests, the first ones.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="So many copies of the trace at the same time, which share nothing.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """The router's own code on a virtual clock, before workers that are models."""
    try:
        schedule = mooncake.read(trace, block_size=block_size).repeated(repeat)
        if requests is not None:
            schedule = schedule.first(num_requests=requests)
        schedule = schedule.with_speedup(speedup)
        if worker_model == DECLARED:
            model = dataclasses.replace(declared(), block_size=block_size)
        else:
            model = fitted(Path(worker_model.removeprefix(FITTED)))
            if block_size % model.block_size:
                raise BadInput(f"the trace's blocks of {block_size} tokens are no multiple of the workers', which have {model.block_size}")
            schedule = schedule.shrunk(block_size // model.block_size)
        started = time.perf_counter()
        simulation = simulate(
            schedule,
            model,
            num_prefill=prefill,
            num_decode=decode,
            policy=policy,
            router_model=router_model,
            max_local_tokens=max_local_tokens,
            overhead_s=overhead_ms / 1e3,
            link_bytes_per_s=None if link_gbps is None else link_gbps * 1e9 / 8,
        )
        wall_s = time.perf_counter() - started
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    report = _report(simulation, wall_s, ceilings(schedule, num_pools=prefill or decode, blocks_per_pool=model.num_blocks))
    report["source"], report["schedule_sha256"] = schedule.source, schedule.digest
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def _report(simulation: Simulation, wall_s: float, ceiling: Ceilings) -> dict[str, Any]:
    records = simulation.records
    done = [record for record in records if record.finished_s is not None]
    input_tokens = sum(record.input_tokens for record in done) or 1
    remote = [record for record in done if record.prefill_worker_id != record.decode_worker_id]
    local = [record for record in done if record.prefill_worker_id == record.decode_worker_id]
    return {
        "format": REPORT_FORMAT,
        "requests": {
            "offered": len(records),
            "completed": len(done),
            "refused": sum(1 for record in records if record.refused),
            "prefilled_on_decode": len(local),
        },
        "prefix_reuse": sum(record.prefill_cached_tokens for record in remote) / input_tokens,
        "decode_reuse": sum(record.decode_cached_tokens for record in local) / input_tokens,
        "ceilings": dataclasses.asdict(ceiling),
        "ttft_ms": _milliseconds([record.ttft_s for record in done]),
        "tpot_ms": _milliseconds([record.tpot_s for record in done if record.tpot_s is not None]),
        "prefill_queue_ms": _milliseconds([record.queue_s for record in done]),
        "transfer_tail_ms": _milliseconds(
            [r.landed_s - r.prefill_done_s for r in remote if r.landed_s is not None and r.prefill_done_s is not None]
        ),
        "kv_bytes": sum(record.kv_bytes for record in done),
        "preemptions": sum(worker.num_preemptions for worker in simulation.workers),
        "virtual_s": simulation.virtual_s,
        "wall_s": wall_s,
        "peak_rss_mb": _peak_rss_mb(),
        "events": simulation.num_events,
    }


def _peak_rss_mb() -> float:
    """Of this process so far, in 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _milliseconds(seconds: Sequence[float]) -> dict[str, float] | None:
    found = distribution([value * 1e3 for value in seconds])
    return None if found is None else dataclasses.asdict(found)


def _print(report: dict[str, Any]) -> None:
    console = Console()
    counts = report["requests"]
    console.print(f"{report['source']}: {counts['completed']} of {counts['offered']} requests completed, {counts['refused']} refused")
    ceiling = report["ceilings"]
    console.print(
        f"prompt tokens from caches of prefill workers {report['prefix_reuse']:.3f}, of decode workers {report['decode_reuse']:.3f}"
    )
    console.print(
        f"what the trace permits: infinite cache {ceiling['infinite']:.3f}, one pool of this size {ceiling['one_pool']:.3f}, "
        f"their pools in turn {ceiling['round_robin']:.3f}"
    )
    table = Table("ms", "mean", "p50", "p90", "p99")
    for label, key in (
        ("TTFT", "ttft_ms"),
        ("TPOT", "tpot_ms"),
        ("of TTFT: prefill queue", "prefill_queue_ms"),
        ("of TTFT: blocks after the prompt", "transfer_tail_ms"),
    ):
        if (row := report[key]) is not None:
            table.add_row(label, *(f"{row[name]:,.1f}" for name in ("mean", "p50", "p90", "p99")))
    console.print(table)
    console.print(f"{report['virtual_s']:,.0f} s of virtual time in {report['wall_s']:.1f} s, {report['peak_rss_mb']:,.0f} MB of memory")
