"""Which workload, and what is done to it: one set of options for every command that takes one, and the schedule they make.

In this order: read or generate; divide lengths (--scale); keep what the model takes (--max-model-len); copy (--repeat); other arrivals
(--rate, --arrivals, --burstiness); speed up; keep the beginning (--seconds, --requests).
"""

import enum
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, get_type_hints

import msgspec
import typer

from loadtest.files import BadInput, open_text
from loadtest.schedule import FORMAT, Schedule
from loadtest.traces import azure, generated, mooncake, servegen, text, weka
from loadtest.traces.arrivals import Arrivals, restamped

BLOCK_SIZE = 512
NUM_GENERATED = 1000

Command = ParamSpec("Command")


class Format(enum.StrEnum):
    SCHEDULE = "schedule"
    MOONCAKE = "mooncake"
    AZURE = "azure"
    WEKA = "weka"
    SERVEGEN = "servegen"
    TEXT = "text"
    GENERATED = "generated"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """As given on a command line; what is None was not given."""

    source: Annotated[str, typer.Argument(help="A file, .gz or not: a schedule of ours or a trace. Or `generated`.")]
    format: Annotated[Format | None, typer.Option(help="What the file is; found out from its beginning when not given.")] = None
    seconds: Annotated[float | None, typer.Option(min=0.0, help="Only requests that come within so many seconds.")] = None
    requests: Annotated[int | None, typer.Option(min=1, help="Only so many requests, the first ones.")] = None
    scale: Annotated[int, typer.Option(min=1, help="Divides all lengths, blocks too, for small models; shared prefixes stay shared.")] = 1
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Only requests whose input and output have at most so many tokens, after --scale.")
    ] = None
    speedup: Annotated[float, typer.Option(min=1e-6, help="Everything comes so many times as fast, think times too.")] = 1.0
    repeat: Annotated[int, typer.Option(min=1, help="So many copies at the same time, which share nothing.")] = 1
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Arrivals a second instead of the recorded ones; of a recorded session its start is one.")
    ] = None
    arrivals: Annotated[
        Arrivals | None, typer.Option(help="How they come: poisson when there is a --rate; trace keeps the pattern that was recorded.")
    ] = None
    burstiness: Annotated[
        float | None, typer.Option(min=1e-3, help="Shape of Gamma arrivals: 1 is Poisson, less comes in bursts, more is steadier.")
    ] = None
    block_size: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens of a block, {BLOCK_SIZE} when not given; of a schedule or weka the file says it.")
    ] = None
    spread: Annotated[
        float | None, typer.Option(min=0.0, help="mooncake: moves each stamp by a random time below it, in seconds (3: the recorded grid).")
    ] = None
    session_rate: Annotated[
        float | None, typer.Option(min=1e-6, help=f"weka: sessions that start a second, {weka.SESSION_RATE:g} when not given.")
    ] = None
    sessions: Annotated[
        bool | None, typer.Option("--sessions", help="generated: later turns wait for the answer before, instead of having a time.")
    ] = None
    tenants: Annotated[int | None, typer.Option(min=1, help="generated: whose requests they are, the first has most.")] = None
    think: Annotated[
        float | None,
        typer.Option(min=0.0, help=f"generated: median seconds between turns, {generated.THINK_S:g} when not given; text: before each."),
    ] = None
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"text: tokens to be answered, where the file does not say; else {text.OUTPUT_TOKENS}.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0


# Options that mean nothing for other workloads: to ignore one would be to test something else than was asked for.
_FORMATS_OF = {
    "block_size": set(Format) - {Format.SCHEDULE, Format.WEKA},
    "spread": {Format.MOONCAKE},
    "session_rate": {Format.WEKA},
    "sessions": {Format.GENERATED},
    "tenants": {Format.GENERATED},
    "think": {Format.GENERATED, Format.TEXT},
    "output_tokens": {Format.TEXT},
}

# The fields by which the first line of a JSON Lines file is known.
_KNOWN_BY = {"hash_ids": Format.MOONCAKE, "requests": Format.WEKA, "turns": Format.TEXT, "prompt": Format.TEXT, "text": Format.TEXT}
_HEADERS = {"TIMESTAMP,ContextTokens,GeneratedTokens": Format.AZURE, "timestamp_s,tenant,input_length,output_length": Format.SERVEGEN}


def takes_workload(command: Callable[Concatenate[WorkloadOptions, Command], None]) -> Callable[..., None]:
    """Gives a typer command all of WorkloadOptions as parameters of its own, the source first: it gets them as its first argument."""
    hints = get_type_hints(WorkloadOptions, include_extras=True)
    source, *options = (
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
        )
        for field in fields(WorkloadOptions)
    )
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    ]

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        workload = WorkloadOptions(**{name: values.pop(name) for name in hints})
        command(workload, **values)  # type: ignore[call-arg]  # what is left is its own

    parameters = [source, *own, *options]
    expanded.__dict__["__signature__"] = inspect.Signature(parameters)
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def load_workload(options: WorkloadOptions) -> Schedule:
    """The schedule that the options ask for.

    Raises BadInput for a file that cannot be read, options that do not belong together, or when no request is left.
    """
    for field in fields(options):
        if isinstance(value := getattr(options, field.name), float) and not math.isfinite(value):
            raise BadInput(f"{_flag(field.name)} must be a finite number")
    source_format = options.format or (Format.GENERATED if options.source == Format.GENERATED else detect(Path(options.source)))
    for name, formats in _FORMATS_OF.items():
        if getattr(options, name) is not None and source_format not in formats:
            raise BadInput(f"{_flag(name)} is for {', '.join(sorted(formats))}; {options.source} is {source_format}")
    arrivals, burstiness = _arrivals(options)
    schedule = _read(options, source_format, burstiness).shrunk(options.scale)
    if options.max_model_len is not None:
        schedule = schedule.fitting(options.max_model_len)
    schedule = schedule.repeated(options.repeat)
    if source_format in (Format.GENERATED, Format.TEXT):
        if arrivals is Arrivals.TRACE:
            raise BadInput(f"--arrivals trace: no arrivals are recorded in {source_format}")
    elif arrivals is not None:
        schedule = restamped(schedule, arrivals, rate=options.rate, burstiness=burstiness, seed=options.seed)
    schedule = schedule.with_speedup(options.speedup).first(seconds=options.seconds, num_requests=options.requests)
    if not schedule.requests:
        raise BadInput(f"no request is left: {schedule.source}")
    return schedule


def detect(path: Path) -> Format:
    """What a file is, from its first line. Raises BadInput when it is none of the formats."""
    with open_text(path, "r") as file:
        first = next((line.strip() for line in file if line.strip()), "")
    if first in _HEADERS:
        return _HEADERS[first]
    try:
        row = msgspec.json.decode(first, type=dict[str, Any])
    except msgspec.MsgspecError:
        row = {}
    if row.get("format") == FORMAT:
        return Format.SCHEDULE
    for field, known in _KNOWN_BY.items():
        if field in row:
            return known
    raise BadInput(f"{path}, line 1: this is none of the formats {', '.join(Format)} (--format)")


def _read(options: WorkloadOptions, source_format: Format, burstiness: float) -> Schedule:
    path, seed = Path(options.source), options.seed
    block_size = BLOCK_SIZE if options.block_size is None else options.block_size
    match source_format:
        case Format.SCHEDULE:
            return Schedule.load(path)
        case Format.MOONCAKE:
            return mooncake.read(path, block_size=block_size, spread_s=options.spread or 0.0, seed=seed)
        case Format.AZURE:
            return azure.read(path, block_size=block_size)
        case Format.SERVEGEN:
            return servegen.read(path, block_size=block_size)
        case Format.WEKA:
            return weka.read(path, session_rate=options.session_rate or weka.SESSION_RATE, seed=seed)
        case Format.TEXT:
            return text.read(
                path,
                block_size=block_size,
                rate=options.rate or 1.0,
                burstiness=burstiness,
                think_s=options.think or 0.0,
                output_tokens=options.output_tokens or text.OUTPUT_TOKENS,
                seed=seed,
            )
        case Format.GENERATED:
            return generated.generate(
                _num_generated(options, burstiness),
                rate=options.rate or generated.RATE,
                burstiness=burstiness,
                num_tenants=options.tenants or 1,
                think_s=generated.THINK_S if options.think is None else options.think,
                sessions=bool(options.sessions),
                block_size=block_size,
                seed=seed,
            )


def _num_generated(options: WorkloadOptions, burstiness: float) -> int:
    """Enough for the limits; what is too much is cut off afterwards."""
    if options.requests is not None:
        return options.requests
    if options.seconds is None:
        return NUM_GENERATED
    expected = (options.rate or generated.RATE) * options.seconds * options.speedup
    return math.ceil(expected + 10 * math.sqrt((expected + 1) / burstiness)) + 10


def _arrivals(options: WorkloadOptions) -> tuple[Arrivals | None, float]:
    """The process, None for the recorded times as they are, and its burstiness."""
    arrivals = options.arrivals
    if arrivals is None and (options.rate is not None or options.burstiness is not None):
        arrivals = Arrivals.POISSON if options.burstiness is None else Arrivals.GAMMA
    if (arrivals is Arrivals.GAMMA) != (options.burstiness is not None):
        raise BadInput(f"--burstiness and --arrivals gamma go together; --arrivals is {arrivals}")
    return arrivals, 1.0 if options.burstiness is None else options.burstiness


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
