"""`loadtest report`: a result as a page and in the terminal, or two compared; its exit status is for continuous integration.

0: fine. 1: `--check` found the run invalid or its attainment too low, or `--compare` found a significant worsening. 2: bad input.
"""

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from loadtest.files import BadInput
from loadtest.report.compare import compare as compared
from loadtest.report.compare_page import Run, compare_page, print_comparison
from loadtest.report.imports import load_any
from loadtest.report.judge import judged_by
from loadtest.report.page import write_page
from loadtest.report.run_page import run_page
from loadtest.report.terminal import print_result
from loadtest.report.text import percent


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="A result; more of them are further rates. Or AIPerf's profile_export.jsonl, vLLM's or GuideLLM's JSON (FILE#2)."
        ),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The page; beside the result when not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables; a page only with -o.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Compares two: what the second does better or worse than the first.")] = False,
    tolerance: Annotated[float, typer.Option(min=0.0, help="--compare: worsenings up to so many per cent pass.")] = 2.0,
    check: Annotated[bool, typer.Option("--check", help="Exits with 1 for an invalid run or too low an attainment.")] = False,
    min_attainment: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="--check: the least share of requests within the objective.")
    ] = 0.0,
    ttft_ms: Annotated[float | None, typer.Option(min=0.0, help="Another objective than the result's for the first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(min=0.0, help="Another objective than the result's for the other tokens.")] = None,
) -> None:
    """Shows results, or compares two: a page that works offline, and a summary."""
    try:
        if compare and len(results) != 2:
            raise BadInput(f"--compare takes two results, not {len(results)}")
        runs = [_under(load_any(path), ttft_ms, tpot_ms) for path in results]
        page_path = output or (None if as_json else results[0].with_suffix(".compare.html" if compare else ".html"))
        if compare:
            failed = _compare(runs[0], runs[1], page_path, tolerance / 100, as_json=as_json)
        else:
            failed = _show(runs, page_path, min_attainment, as_json=as_json, check=check)
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(int(failed))


def _show(runs: list[Run], page_path: Path | None, min_attainment: float, *, as_json: bool, check: bool) -> bool:
    """Whether a check failed."""
    (result, records), others = runs[0], [other for other, _ in runs[1:]]
    write_page(run_page(result, records, others), page_path)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())
    else:
        print_result(Console(), result, records)
        typer.echo(f"page: {page_path}")
    if not check:
        return False
    is_short = result.summary.attainment < min_attainment
    if is_short:
        typer.echo(f"check: attainment {percent(result.summary.attainment)} is below {percent(min_attainment)}", err=True)
    if not result.verdict.valid:
        typer.echo("check: the run is invalid", err=True)
    return is_short or not result.verdict.valid


def _compare(before: Run, after: Run, page_path: Path | None, tolerance: float, *, as_json: bool) -> bool:
    """Whether the second is worse."""
    comparison = compared(before, after)
    write_page(compare_page(comparison, before, after, tolerance=tolerance), page_path)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(comparison), indent=2).decode())
    else:
        print_comparison(Console(), comparison, tolerance=tolerance)
        typer.echo(f"page: {page_path}")
    return bool(comparison.worse(tolerance))


def _under(run: Run, ttft_ms: float | None, tpot_ms: float | None) -> Run:
    """The run under the objective asked for."""
    result, records = run
    objective = result.objective
    if ttft_ms is not None:
        objective = msgspec.structs.replace(objective, ttft_s=ttft_ms / 1e3, ttft_per_token_s=0.0)
    if tpot_ms is not None:
        objective = msgspec.structs.replace(objective, tpot_s=tpot_ms / 1e3)
    return judged_by(result, records, objective), records
