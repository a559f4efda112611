"""GuideLLM's JSON report: benchmarks, each with its requests by how they ended, times in seconds since 1970.

Read as version 0.8 writes it. Only strategies with a schedule say when a request was meant to leave; others send as soon as they can.
Source: https://github.com/vllm-project/guidellm
"""

from pathlib import Path

import msgspec

from loadtest.files import BadInput, open_text
from loadtest.records import Outcome, RequestRecord

TOOL = "GuideLLM"
_SCHEDULED = ("constant", "poisson", "trace", "replay")


class _Timings(msgspec.Struct):
    targeted_start: float | None = None
    resolve_start: float | None = None
    request_start: float | None = None
    first_token_iteration: float | None = None
    last_token_iteration: float | None = None
    request_end: float | None = None
    resolve_end: float | None = None


class _Info(msgspec.Struct):
    timings: _Timings
    error: str | None = None


class _Request(msgspec.Struct):
    request_id: str
    info: _Info
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None


class _Requests(msgspec.Struct):
    successful: list[_Request] = []
    errored: list[_Request] = []
    incomplete: list[_Request] = []


class _Strategy(msgspec.Struct):
    type_: str = ""


class _Config(msgspec.Struct):
    strategy: _Strategy = msgspec.field(default_factory=_Strategy)


class _Benchmark(msgspec.Struct):
    requests: _Requests
    config: _Config = msgspec.field(default_factory=_Config)


class _Report(msgspec.Struct):
    benchmarks: list[_Benchmark]


def read(path: Path, number: str = "") -> list[RequestRecord]:
    """The requests of one benchmark, the `number`-th from 1; a report of one needs none. Raises BadInput."""
    with open_text(path, "r") as file:
        try:
            benchmarks = msgspec.json.decode(file.read(), type=_Report).benchmarks
        except msgspec.MsgspecError as error:
            raise BadInput(f"{path}: {error}") from None
    if not number and len(benchmarks) != 1:
        raise BadInput(f"{path} has {len(benchmarks)} benchmarks: name one, as {path.name}#1")
    if number and not (number.isascii() and number.isdigit() and 1 <= int(number) <= len(benchmarks)):
        raise BadInput(f"{path.name}#{number}: it has benchmarks 1 to {len(benchmarks)}")
    benchmark = benchmarks[int(number or 1) - 1]
    is_scheduled = benchmark.config.strategy.type_ in _SCHEDULED
    requests = benchmark.requests
    ended = [(request, Outcome.COMPLETED) for request in requests.successful]
    ended += [(request, Outcome.FAILED) for request in (*requests.errored, *requests.incomplete)]
    return [record for request, outcome in ended if (record := _record(request, outcome, is_scheduled=is_scheduled)) is not None]


def _record(request: _Request, outcome: Outcome, *, is_scheduled: bool) -> RequestRecord | None:
    """None for one that was cancelled before it had a time at all."""
    timings = request.info.timings
    sent_s = timings.request_start if timings.request_start is not None else timings.resolve_start
    if sent_s is None:
        return None
    at_s = timings.targeted_start if is_scheduled and timings.targeted_start is not None else sent_s
    return RequestRecord(
        index=0,
        at_s=min(at_s, sent_s),
        sent_s=sent_s,
        input_tokens=request.prompt_tokens or 0,
        output_tokens=request.output_tokens or 0,
        outcome=outcome,
        error=request.info.error or ("" if outcome is Outcome.COMPLETED else "incomplete"),
        first_token_s=timings.first_token_iteration,
        last_token_s=timings.last_token_iteration,
        finished_s=timings.request_end if timings.request_end is not None else timings.resolve_end,
        cached_tokens=request.cached_tokens,
        request_id=request.request_id,
    )
