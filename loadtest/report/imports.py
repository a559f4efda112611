"""Result files of other tools as ours, so that their figures can be read and compared with the same definitions.

Each tool's own file knows its format; here they become a result of kind "imported". They name no schedule, no cluster and no objective;
where they tell when a request was meant to leave, latencies count from then, as everywhere here, and "TTFT as sent" is the tool's own TTFT.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from loadtest.files import BadInput, open_text
from loadtest.records import Objective, RequestRecord
from loadtest.report import aiperf, guidellm, vllm_bench
from loadtest.result import Cluster, Result, ScheduleFacts, load_result
from loadtest.summary import summarize
from loadtest.verdict import verdict

_ABSENT = msgspec.Raw()


class _Shape(msgspec.Struct):
    """What tells the formats apart."""

    format: str | None = None
    metadata: msgspec.Raw = _ABSENT
    metrics: msgspec.Raw = _ABSENT
    ttfts: msgspec.Raw = _ABSENT
    request_throughput: msgspec.Raw = _ABSENT
    benchmarks: msgspec.Raw = _ABSENT


def load_any(path: Path) -> tuple[Result, list[RequestRecord]]:
    """Reads a result of ours, AIPerf's profile_export.jsonl, `vllm bench serve --save-detailed`, or GuideLLM's JSON.

    Of GuideLLM's report of several benchmarks, FILE#2 is the second. Raises BadInput for anything else.
    """
    name, _, number = path.name.partition("#")
    file_path = path.with_name(name)
    shape = _shape(file_path)
    if shape.format is not None:
        return load_result(file_path)
    if shape.benchmarks != _ABSENT:
        return _imported(guidellm.TOOL, path, guidellm.read(file_path, number))
    if number:
        raise BadInput(f"{path}: only a GuideLLM report has several benchmarks")
    if shape.ttfts != _ABSENT or shape.request_throughput != _ABSENT:
        return _imported(vllm_bench.TOOL, path, vllm_bench.read(file_path))
    if shape.metadata != _ABSENT and shape.metrics != _ABSENT:
        return _imported(aiperf.TOOL, path, aiperf.read(file_path))
    raise BadInput(f"{file_path} is no result of `loadtest`, AIPerf (profile_export.jsonl), `vllm bench serve` (JSON) or GuideLLM (JSON)")


def _shape(path: Path) -> _Shape:
    """Of the whole file if it is one JSON object, else of its first line."""
    with open_text(path, "r") as file:
        try:
            text = file.read()
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise BadInput(f"{path} cannot be read: {error}") from None
    problem = ""
    for part in (text, text.split("\n", 1)[0]):
        try:
            return msgspec.json.decode(part, type=_Shape)
        except msgspec.MsgspecError as error:
            problem = problem or str(error)
    raise BadInput(f"{path}: {problem}")


def _imported(tool: str, path: Path, records: Sequence[RequestRecord]) -> tuple[Result, list[RequestRecord]]:
    """Times become seconds from the first intended one; requests are numbered in that order."""
    if not records:
        raise BadInput(f"{path}: it has no requests")
    ordered = sorted(records, key=lambda record: record.at_s)
    start_s = ordered[0].at_s
    for index, record in enumerate(ordered):
        record.index = index
        for field in ("at_s", "sent_s", "first_token_s", "last_token_s", "finished_s"):
            value = getattr(record, field)
            setattr(record, field, None if value is None else value - start_s)
        _check_order(record, path)
    objective = Objective()
    duration_s = ordered[-1].at_s
    result = Result(
        kind="imported",
        name=f"{path.name} ({tool})",
        created="",
        command=(),
        baton="",
        commit="",
        machine="",
        schedule=ScheduleFacts(source=f"{tool}'s", digest="", seed=0, requests=len(ordered), duration_s=duration_s, block_size=0),
        cluster=Cluster(target=""),
        objective=objective,
        verdict=verdict(ordered, objective),
        summary=summarize(ordered, objective=objective, duration_s=duration_s),
        extra={"tool": tool},
    )
    return result, ordered


def _check_order(record: RequestRecord, path: Path) -> None:
    times = [time for time in (record.sent_s, record.first_token_s, record.last_token_s, record.finished_s) if time is not None]
    # Floating point of seconds since 1970 is good for a microsecond.
    if any(later < earlier - 1e-5 for earlier, later in pairwise(times)):
        raise BadInput(f"{path}, request {record.index}: sent, first token, last token and end do not follow one another: {times}")
