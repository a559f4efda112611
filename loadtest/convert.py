"""`loadtest convert`: reads or makes a workload, and writes it as our schedule or as Mooncake's JSON Lines."""

import dataclasses
import enum
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadtest.files import BadInput
from loadtest.traces import mooncake
from loadtest.workload_options import WorkloadOptions, load_workload, takes_workload
from loadtest.workload_summary import summarize, table


class Target(enum.StrEnum):
    SCHEDULE = "schedule"
    MOONCAKE = "mooncake"


@takes_workload
def convert(
    workload: WorkloadOptions,
    dest: Annotated[Path, typer.Argument(help="The file to write, compressed when its name ends in .gz.")],
    to: Annotated[
        Target, typer.Option(help="Our schedule, or Mooncake's format for other tools, in which sessions are lost.")
    ] = Target.SCHEDULE,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Writes a workload as a file that can be replayed, and says what is in it."""
    try:
        if dest.exists() and Path(workload.source).exists() and dest.samefile(workload.source):
            raise BadInput(f"{dest} is the source itself")
        schedule = load_workload(workload)
        if to is Target.MOONCAKE:
            mooncake.write(schedule, dest)
        else:
            schedule.save(dest)
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    summary = summarize(schedule)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(summary), indent=2))
    else:
        Console().print(table(summary))
