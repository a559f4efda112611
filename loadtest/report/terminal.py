"""A result in a terminal: what a run prints at its end, and `report` again."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from loadtest.attribution import e2e_stages, ttft_stages
from loadtest.records import Outcome, RequestRecord
from loadtest.report.stacks import Stack, rows, stacks
from loadtest.report.text import percent, rate, size, three_digits
from loadtest.result import Result


def print_result(console: Console, result: Result, records: Sequence[RequestRecord]) -> None:
    """The verdict, the headline figures, the stages; nothing that the result does not have."""
    summary = result.summary
    console.print(Text(f"{result.name}: {result.schedule.source}", style="bold"))
    console.print(
        f"{summary.offered:,} requests offered at {rate(summary.offered_rate)}, "
        f"{summary.completed:,} completed at {rate(summary.achieved_rate)}, {summary.refused:,} refused, {summary.failed:,} failed, "
        f"{summary.offered - summary.sent:,} unsent",
        highlight=False,
    )
    console.print(
        f"attainment {percent(summary.attainment)} (95 %: {percent(summary.attainment_low)} to {percent(summary.attainment_high)}), "
        f"goodput {rate(summary.goodput)}",
        highlight=False,
    )
    console.print(_latencies(result))
    if summary.reuse is not None:
        limits = result.ceilings
        beside = (
            ""
            if limits is None
            else (
                f"; the schedule permits {percent(limits.infinite)} (infinite cache), {percent(limits.one_pool)} (one pool), "
                f"{percent(limits.round_robin)} (pools in turn)"
            )
        )
        console.print(f"prompt tokens from caches {percent(summary.reuse)}{beside}", highlight=False)
    if summary.kv_bytes_expected is not None:
        console.print(f"KV moved {size(summary.kv_bytes)}, expected {size(summary.kv_bytes_expected)}", highlight=False)
    if summary.jain is not None:
        worst, tenant = min(summary.tenants.items(), key=lambda item: item[1].attainment)
        console.print(
            f"{len(summary.tenants)} tenants: Jain {summary.jain:.3f}; worst {worst!r}, {percent(tenant.attainment)}", highlight=False
        )
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    for name, stacked in (
        ("TTFT", stacks(completed, lambda record: record.ttft_s, ttft_stages)),
        ("E2E", stacks(completed, lambda record: record.e2e_s, e2e_stages)),
    ):
        if stacked:
            console.print(_stages(name, stacked))
    if summary.broke:
        causes = ", ".join(f"{cause.replace('_', ' ')} {count:,}" for cause, count in summary.broke.items())
        console.print(f"what broke the objective: {causes}", highlight=False)
    for fault in result.faults:
        noticed = "never noticed" if fault.detected_s is None else f"noticed after {fault.detected_s:.1f} s"
        recovered = "never recovered" if fault.recovered_s is None else f"95 % of goodput after {fault.recovered_s:.1f} s"
        console.print(f"fault at {fault.at_s:.1f} s: {fault.kind} {fault.worker_id}, {noticed}, {recovered}", highlight=False)
    for found in (result.exactness, result.capacity):
        if found is not None:
            console.print(str(found), highlight=False)
    if result.verdict.valid:
        console.print(Text("valid", style="bold green"))
    for problem in result.verdict.problems:
        console.print(Text(f"INVALID: {problem}", style="bold red"))


def _latencies(result: Result) -> Table:
    table = Table("ms", *(Column(name, justify="right") for name in ("mean", "p50", "p90", "p99", "objective")), box=None, pad_edge=False)
    objective = result.objective
    ttft_limit = f"{objective.ttft_s * 1e3:,g}" + (f" + {objective.ttft_per_token_s * 1e3:g} a token" if objective.ttft_per_token_s else "")
    found_rows = (
        ("TTFT", result.summary.ttft_ms, ttft_limit),
        ("TPOT", result.summary.tpot_ms, f"{objective.tpot_s * 1e3:,g}"),
        ("ITL", result.summary.itl_ms, ""),
        ("E2E", result.summary.e2e_ms, ""),
        ("send lag", result.summary.lag_ms, ""),
    )
    for name, found, limit in found_rows:
        if found is not None:
            table.add_row(name, *(three_digits(value) for value in (found.mean, found.p50, found.p90, found.p99)), limit)
    return table


def _stages(name: str, found: dict[str, Stack]) -> Table:
    table = Table(f"stages of {name}, ms", *(Column(f"around {label}", justify="right") for label in found), box=None, pad_edge=False)
    for row in rows(found):
        table.add_row(row.name, *(three_digits(value * 1e3) for value in row.seconds.values()))
    return table
