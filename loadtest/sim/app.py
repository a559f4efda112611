"""`loadtest sim`: sends a workload to simulated workers and says what each request waited for."""

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
from loadtest.records import Objective
from loadtest.report.page import write_page
from loadtest.report.run_page import run_page
from loadtest.result import save_result
from loadtest.schedule import Schedule
from loadtest.sim.outcome import result_of
from loadtest.sim.policy_table import DYNAMO_DIGEST, policy_table
from loadtest.sim.simulation import Policy, RouterModel, Simulation, simulate
from loadtest.sim.worker import Chunks
from loadtest.sim.worker_model import WorkerModel, declared, fitted
from loadtest.workload_options import WorkloadOptions, load_workload, takes_workload

REPORT_FORMAT = "baton.sim/1"
DECLARED, FITTED = "declared", "fitted:"


@takes_workload
def sim(
    workload: WorkloadOptions,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers; with none, decode workers do both phases.")] = 8,
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 8,
    policy: Annotated[Policy, typer.Option(help="Who chooses workers.")] = Policy.BATON,
    worker_model: Annotated[
        str, typer.Option(help='How long steps take: "declared", or the file of `baton bench profile`, with "fitted:" before it or not.')
    ] = DECLARED,
    link_gbps: Annotated[
        float | None, typer.Option(min=1e-6, help="10^9 bits/s of each worker's link, each way; blocks travel in no time when not given.")
    ] = None,
    overhead_ms: Annotated[
        float | None, typer.Option(min=0.0, help="What calls and wake-ups add to a first token; what was profiled when not given.")
    ] = None,
    router_model: Annotated[
        RouterModel, typer.Option(help="What the router knows of the workers' speed: it learns it, as it does in a mesh, or is told it.")
    ] = RouterModel.LEARNT,
    chunks: Annotated[
        Chunks | None,
        typer.Option(
            help="How workers cut prompts longer than a step's chunk: in equal ones, as the engine does, or in full ones and a rest, as "
            "others do; when not given, equal with baton, full with round-robin."
        ),
    ] = None,
    max_local_tokens: Annotated[
        int | None, typer.Option(min=0, help="Decode workers compute at most so many prompt tokens; as the router sees fit when not given.")
    ] = None,
    ttft_slo: Annotated[float, typer.Option(min=1e-3, help="Objective: seconds to the first token.")] = 1.0,
    ttft_slo_per_token: Annotated[float, typer.Option(min=0.0, help="Objective: that many seconds more for each prompt token.")] = 0.0,
    tpot_slo: Annotated[float, typer.Option(min=1e-4, help="Objective: seconds per token after the first.")] = 0.1,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where the result goes (.json), its requests beside it.")] = None,
    html: Annotated[Path | None, typer.Option(help="Where the report goes.")] = None,
    as_table: Annotated[bool, typer.Option("--table", help="Both policies at speed-ups 1, 2, 3, 4 and 6, in one table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """The router's own code on a virtual clock, before workers that are models."""
    try:
        schedule = load_workload(workload)
        model = declared() if worker_model == DECLARED else fitted(Path(worker_model.removeprefix(FITTED)))
        schedule, model = _matched(schedule, model, is_declared=worker_model == DECLARED)
        possible = ceilings(schedule, num_pools=prefill or decode, blocks_per_pool=model.num_blocks)

        def simulated(policy: Policy, speedup: float) -> tuple[Simulation, float]:
            started = time.perf_counter()
            simulation = simulate(
                schedule.with_speedup(speedup),
                model,
                num_prefill=prefill,
                num_decode=decode,
                policy=policy,
                router_model=router_model,
                chunks=chunks,
                max_local_tokens=max_local_tokens,
                overhead_s=None if overhead_ms is None else overhead_ms / 1e3,
                link_bytes_per_s=None if link_gbps is None else link_gbps * 1e9 / 8,
            )
            return simulation, time.perf_counter() - started

        if as_table:
            is_dynamo_s = (schedule.digest, worker_model, prefill, decode) == (DYNAMO_DIGEST, DECLARED, 8, 8)
            table, reports = policy_table(lambda policy, speedup: _report(*simulated(policy, speedup), possible), beside_dynamo=is_dynamo_s)
            if as_json:
                typer.echo(json.dumps(reports, indent=2))
            else:
                Console().print(table)
            return
        simulation, wall_s = simulated(policy, 1.0)
        if output is not None or html is not None:
            objective = Objective(ttft_s=ttft_slo, ttft_per_token_s=ttft_slo_per_token, tpot_s=tpot_slo)
            name = f"simulated: {Path(workload.source).name}"
            result, records = result_of(simulation, schedule, model, objective, possible, name=name, workers=(prefill, decode))
            if output is not None:
                save_result(result, records, output)
            write_page(run_page(result, records), html)
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    report = _report(simulation, wall_s, possible)
    report["source"], report["schedule_sha256"] = schedule.source, schedule.digest
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def _matched(schedule: Schedule, model: WorkerModel, *, is_declared: bool) -> tuple[Schedule, WorkerModel]:
    """Content blocks and KV blocks of one size: a declared worker has the schedule's, a real one its own, to which lengths are divided."""
    if any(request.text for request in schedule.requests):
        raise BadInput("a simulation needs prompts of blocks: of texts nobody knows what they share")
    if is_declared:
        return schedule, dataclasses.replace(model, block_size=schedule.block_size)
    if schedule.block_size % model.block_size:
        raise BadInput(
            f"the workload's blocks of {schedule.block_size} tokens are no multiple of the workers', which have {model.block_size}"
        )
    return schedule.shrunk(schedule.block_size // model.block_size), model


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
