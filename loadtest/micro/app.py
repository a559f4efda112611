"""The `micro` commands: run, print, and with --check fail when a figure falls short."""

from pathlib import Path
from typing import Annotated

import typer

from loadtest.micro import engine as engine_benchmark
from loadtest.micro.figure import print_figures

app = typer.Typer(no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]
Check = Annotated[bool, typer.Option("--check", help="Exit 1 when a figure falls short of its target.")]
Runs = Annotated[int, typer.Option(min=1, help="Measurements per figure; the median counts.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch, on both sides.")]


@app.callback()
def micro() -> None:
    """Small benchmarks."""


@app.command()
def engine(
    as_json: Json = False,
    check: Check = False,
    runs: Runs = 5,
    threads: Threads = 1,
    vllm: Annotated[Path | None, typer.Option(help="A Python interpreter that has vLLM: measures beside it as well.")] = None,
) -> None:
    """The engine in process, beside transformers' generate on the same checkpoint."""
    figures, conditions = engine_benchmark.measure(runs=runs, num_threads=threads, vllm_python=vllm)
    print_figures(figures, conditions, as_json=as_json)
    if check and not all(figure.reached for figure in figures):
        raise typer.Exit(1)
