"""`loadtest run`: the command."""

import asyncio
import enum
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from loadtest.files import BadInput
from loadtest.records import Objective
from loadtest.report.page import write_page
from loadtest.report.run_page import run_page
from loadtest.report.terminal import print_result
from loadtest.result import load_result, save_result
from loadtest.run.discovery import discover
from loadtest.run.experiments import Experiment
from loadtest.run.faults import Fault
from loadtest.run.measure import Settings
from loadtest.workload_options import WorkloadOptions, load_workload, takes_workload

DEFAULT_TARGET = "grpc://127.0.0.1:50051"
API_KEY = "OPENAI_API_KEY"


class Endpoint(enum.StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"


@takes_workload
def run(
    workload: WorkloadOptions,
    target: Annotated[
        str, typer.Option(help="grpc://host:port of a Baton router, or http(s)://host:port/v1 of any OpenAI-compatible server.")
    ] = DEFAULT_TARGET,
    model: Annotated[str, typer.Option(help="What clients call it; the first one that is served when not given.")] = "",
    endpoint: Annotated[Endpoint, typer.Option(help="Over HTTP: completions, or chat for workloads of texts.")] = Endpoint.COMPLETIONS,
    router: Annotated[str | None, typer.Option(help="With an HTTP target that is a Baton: its gRPC address, to see inside.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=2, help="Prompts are made of token ids below it; a Baton says it itself.")] = None,
    header: Annotated[list[str] | None, typer.Option(help=f"'name: value', sent over HTTP; ${API_KEY} is a bearer token.")] = None,
    ttft_slo: Annotated[float, typer.Option(min=1e-3, help="Objective: seconds to the first token.")] = 1.0,
    ttft_slo_per_token: Annotated[float, typer.Option(min=0.0, help="Objective: that many seconds more for each prompt token.")] = 0.0,
    tpot_slo: Annotated[float, typer.Option(min=1e-4, help="Objective: seconds per token after the first.")] = 0.1,
    senders: Annotated[int, typer.Option(min=1, max=64, help="Sender processes.")] = 2,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which a request is given up.")] = 600.0,
    prompt_seed: Annotated[
        int | None, typer.Option(min=0, help="Of the prompts' tokens; drawn when not given, so that no run finds the last one's in caches.")
    ] = None,
    fault: Annotated[
        list[str] | None, typer.Option(help="KIND:WHO@AT\\[/EVERY], KIND one of kill, freeze=S, drain, rolling: kill:prefill,decode@20/20.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Result of the same schedule without faults; made after the run when there are faults and no file.")
    ] = None,
    capacity: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Searches for the highest rate with this attainment, such as 0.99.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where the result goes (.json), its requests beside it.")] = None,
    html: Annotated[Path | None, typer.Option(help="Where the report goes.")] = None,
    name: Annotated[str, typer.Option(help="What the run is called in reports.")] = "",
    live: Annotated[bool, typer.Option("--live/--no-live", help="A live view; lines where there is no terminal.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object instead of tables.")] = False,
) -> None:
    """Sends a workload open-loop to a mesh or another server, and says what each request got.

    Ends with 0 for a valid run, 1 for one whose figures may not be believed or in which faults cost an answer, 2 for wrong usage.
    """
    console = Console(stderr=True)
    try:
        faults = tuple(Fault.parse(text) for text in fault or ())
        if capacity is not None and (faults or reference):
            raise BadInput("--capacity searches without faults: give --fault to a run of its own")
        headers = _headers(header or ())
        server = asyncio.run(discover(target, model=model, endpoint=endpoint, vocab_size=vocab_size, headers=headers, router=router))
        if faults and server.router is None:
            raise BadInput("--fault needs a Baton: --target grpc://host:port, or --router beside an HTTP target")
        if workload.max_model_len is None and server.max_model_len is not None:
            workload = replace(workload, max_model_len=server.max_model_len)
        known = None if reference is None else load_result(reference)
        if known is not None and prompt_seed is None:
            prompt_seed = known[0].extra.get("prompt_seed")
        settings = Settings(
            server=server,
            objective=Objective(ttft_s=ttft_slo, ttft_per_token_s=ttft_slo_per_token, tpot_s=tpot_slo),
            num_senders=senders,
            timeout_s=timeout,
            prompt_seed=random.SystemRandom().getrandbits(32) if prompt_seed is None else prompt_seed,
            console=None if as_json and not console.is_terminal else console,
            shows=live and console.is_terminal,
        )
        experiment = Experiment(load_workload(workload), settings, name or Path(workload.source).name)
        with tempfile.TemporaryDirectory(prefix="baton-loadtest-") as folder:
            if capacity is not None:
                result, records = asyncio.run(experiment.find_capacity(capacity, Path(folder)))
            else:
                # The schedule is kept beside the result: it can be sent again.
                path = Path(folder) / "schedule.jsonl.gz" if output is None else output.with_suffix(".schedule.jsonl.gz")
                result, records = asyncio.run(experiment.run(path, faults, known))
        if output is not None:
            save_result(result, records, output)
        if html is not None:
            write_page(run_page(result, records), html)
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())
    else:
        print_result(Console(), result, records)
    if not result.verdict.valid:
        raise typer.Exit(1)


def _headers(lines: Sequence[str]) -> dict[str, str]:
    headers = {"authorization": f"Bearer {os.environ[API_KEY]}"} if os.environ.get(API_KEY) else {}
    for line in lines:
        name, separator, value = line.partition(":")
        if not separator or not name.strip() or any(character in line for character in "\r\n"):
            raise BadInput(f"--header: {line!r} is not 'name: value'")
        headers[name.strip().lower()] = value.strip()
    return headers
