"""AIPerf's `profile_export.jsonl`: a line for each request, `metadata` with wall-clock nanoseconds, `metrics` with a value and a unit each.

Read as version 0.13 writes it. A request was meant to leave when its credit was issued: a late scheduler is not seen.
Its "request latency" ends with the last token, `request_end_ns` with the stream. Warm-up requests are left out.
Source: https://docs.nvidia.com/aiperf/tutorials/metrics-analysis/working-with-profile-export-files
"""

from pathlib import Path

import msgspec

from loadtest.files import BadInput, open_text, read_rows
from loadtest.records import Outcome, RequestRecord

TOOL = "AIPerf"
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "sec": 1.0, "s": 1.0}
_REFUSALS = (429, 503)


class _Metric(msgspec.Struct):
    value: float | list[float] | str | bool | None
    unit: str = ""


class _Metadata(msgspec.Struct):
    request_start_ns: int
    request_end_ns: int
    credit_issued_ns: int | None = None
    x_request_id: str | None = None
    x_correlation_id: str | None = None
    conversation_id: str | None = None
    turn_index: int | None = None
    benchmark_phase: str = "profiling"
    was_cancelled: bool = False


class _Error(msgspec.Struct):
    message: str
    code: int | None = None
    type: str | None = None


class _Row(msgspec.Struct):
    metadata: _Metadata
    metrics: dict[str, _Metric]
    error: _Error | None = None


def read(path: Path) -> list[RequestRecord]:
    """Its requests, times in seconds since 1970. Raises BadInput for a row of another shape."""
    with open_text(path, "r") as file:
        rows = [(number, row) for number, row in enumerate(read_rows(file, _Row, path), 1) if row.metadata.benchmark_phase != "warmup"]
    # Every request has a conversation; those of several turns are sessions.
    sessions = {_conversation(row.metadata) for _, row in rows if row.metadata.turn_index}
    return [_record(row, f"{path}, request {number}", sessions) for number, row in rows]


def _conversation(metadata: _Metadata) -> str:
    """One run through a conversation: the same one may be sent again."""
    return metadata.x_correlation_id or metadata.conversation_id or ""


def _record(row: _Row, place: str, sessions: set[str]) -> RequestRecord:
    metadata, error = row.metadata, row.error
    sent_s = metadata.request_start_ns / 1e9
    ttft_s, latency_s = _seconds(row, "time_to_first_token", place), _seconds(row, "request_latency", place)
    cached = _number(row, "usage_prompt_cache_read_tokens", place)
    outcome = Outcome.COMPLETED
    if error is not None or metadata.was_cancelled:
        outcome = Outcome.REFUSED if error is not None and error.code in _REFUSALS else Outcome.FAILED
    gaps = row.metrics.get("inter_chunk_latency")
    return RequestRecord(
        index=0,
        # A credit is issued before the request leaves; clocks of two processes may disagree on that by a little.
        at_s=min(sent_s, (metadata.credit_issued_ns or metadata.request_start_ns) / 1e9),
        sent_s=sent_s,
        session=session if (session := _conversation(metadata)) in sessions else "",
        input_tokens=int(_number(row, "usage_prompt_tokens", place) or _number(row, "input_sequence_length", place) or 0),
        output_tokens=int(_number(row, "output_sequence_length", place) or 0),
        planned_tokens=_planned_tokens(row, place),
        outcome=outcome,
        error="" if error is None else f"{error.type or 'error'}: {error.message}",
        first_token_s=None if ttft_s is None else sent_s + ttft_s,
        last_token_s=None if ttft_s is None or latency_s is None else sent_s + latency_s,
        finished_s=metadata.request_end_ns / 1e9,
        gaps_s=[gap * _SECONDS.get(gaps.unit, 1e-3) for gap in gaps.value] if gaps is not None and isinstance(gaps.value, list) else (),
        cached_tokens=None if cached is None else int(cached),
        request_id=metadata.x_request_id or "",
    )


def _planned_tokens(row: _Row, place: str) -> int:
    """What was asked for; the file only says by how many per cent the answer missed it. 0: not known."""
    output_tokens, missed = _number(row, "output_sequence_length", place), row.metrics.get("osl_mismatch_diff_pct")
    if not output_tokens or missed is None or not isinstance(missed.value, int | float) or missed.value <= -100:
        return 0
    return round(output_tokens / (1 + missed.value / 100))


def _number(row: _Row, name: str, place: str) -> float | None:
    metric = row.metrics.get(name)
    if metric is None or metric.value is None:
        return None
    if isinstance(metric.value, bool) or not isinstance(metric.value, int | float) or metric.value < 0:
        raise BadInput(f"{place}: metrics.{name} is {metric.value!r}; it must be a number of at least 0")
    return metric.value


def _seconds(row: _Row, name: str, place: str) -> float | None:
    value = _number(row, name, place)
    if value is None:
        return None
    unit = row.metrics[name].unit
    if unit not in _SECONDS:
        raise BadInput(f"{place}: metrics.{name} has unit {unit!r}, not one of {', '.join(_SECONDS)}")
    return value * _SECONDS[unit]
