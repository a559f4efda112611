"""The `micro` commands: run, print, and with --check fail when a figure falls short."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from loadtest.micro.figure import Figure, print_figures

app = typer.Typer(no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]
Check = Annotated[bool, typer.Option("--check", help="Exit 1 when a figure falls short of its target.")]
Runs = Annotated[int, typer.Option(min=1, help="Measurements per figure; the median counts.")]
Vllm = Annotated[Path | None, typer.Option(help="A Python interpreter that has vLLM: measures beside it as well.")]
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
    vllm: Vllm = None,
) -> None:
    """The engine in process, beside transformers' generate on the same checkpoint."""
    from loadtest.micro import engine as benchmark  # torch takes seconds, which the other benchmarks should not

    _report(*benchmark.measure(runs=runs, num_threads=threads, vllm_python=vllm), as_json=as_json, check=check)


@app.command()
def kv_transfer(as_json: Json = False, check: Check = False, runs: Runs = 5) -> None:
    """KV blocks from process to process over shm, tcp and grpc, beside bare sockets and a bare memory copy."""
    _measure("kv_transfer", runs, as_json=as_json, check=check)


@app.command()
def routing(as_json: Json = False, check: Check = False, runs: Runs = 5) -> None:
    """Decisions among a thousand workers that hold two million blocks."""
    _measure("routing", runs, as_json=as_json, check=check)


@app.command()
def index(as_json: Json = False, check: Check = False, runs: Runs = 5) -> None:
    """The prefix index as a process with its Redis: look-ups, events on their way to a router, events absorbed."""
    _measure("index", runs, as_json=as_json, check=check)


@app.command()
def frames(as_json: Json = False, check: Check = False, runs: Runs = 5) -> None:
    """Tokens from decode to router in step frames beside one stream per request, and what a token costs the router."""
    _measure("frames", runs, as_json=as_json, check=check)


@app.command()
def mesh_overhead(as_json: Json = False, check: Check = False, runs: Runs = 5) -> None:
    """How much of the time to a first token is not the model, on an idle mesh."""
    _measure("mesh_overhead", runs, as_json=as_json, check=check)


@app.command()
def http(as_json: Json = False, check: Check = False, runs: Runs = 5, vllm: Vllm = None) -> None:
    """Tokens/s, TTFT and ITL through the OpenAI face, beside the engine in process."""
    from loadtest.micro import http as benchmark  # torch again

    _report(*benchmark.measure(runs=runs, vllm_python=vllm), as_json=as_json, check=check)


@app.command()
def overload(as_json: Json = False, check: Check = False, runs: Runs = 3) -> None:
    """Goodput at 0.5, 1, 2 and 4 times capacity, with clients that come whether or not the mesh keeps up."""
    _measure("overload", runs, as_json=as_json, check=check)


def _measure(name: str, runs: int, *, as_json: bool, check: bool) -> None:
    benchmark = importlib.import_module(f"loadtest.micro.{name}")
    _report(*benchmark.measure(runs=runs), as_json=as_json, check=check)


def _report(figures: Sequence[Figure], conditions: dict[str, object], *, as_json: bool, check: bool) -> None:
    print_figures(figures, conditions, as_json=as_json)
    if check and not all(figure.reached for figure in figures):
        raise typer.Exit(1)
