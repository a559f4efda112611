"""Where a request's time went, as lines for a terminal: a row for each stage, drawn on a common time axis. Pure functions.

The axis ends at the first token; what follows would squeeze everything before it into a corner. Each stage was measured, the calls between
processes too, and they are laid end to end. Where the clocks of two hosts differ, the way there is too long by as much as the way back is
too short.
"""

import textwrap
from dataclasses import dataclass

from rich.text import Text

from protos.baton.v1 import inference_pb2

WIDTH = 80
_LABEL, _DURATION, _BAR = 13, 9, 18
_NOTE_COLUMN = _LABEL + _DURATION + _BAR + 4
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    label: str
    seconds: float | None = None
    bar: str = ""
    note: str = ""
    style: str = ""


def timeline(timing: inference_pb2.RequestTiming, usage: inference_pb2.Usage, *, num_choices: int = 1) -> list[Text]:
    """The lines of one request, at most WIDTH columns wide; they can be read without colour."""
    rows = [*_rows_until_first_token(timing, usage), *_rows_after_first_token(timing, usage, num_choices)]
    return [*_heading(timing), _axis(timing.ttft_s), *(line for row in rows for line in _lines(row))]


def totals(timing: inference_pb2.RequestTiming, usage: inference_pb2.Usage) -> str:
    """Who served a request and what was there already, in half a line."""
    words = f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached, {_path(timing)}"
    if timing.kv_blocks:
        words += f", {_count(timing.kv_blocks, 'KV block')} over {timing.kv_transport}"
    return words


def duration(seconds: float) -> str:
    """With a unit and three digits or so: 850 µs, 1.23 ms, 45.6 ms, 2.50 s."""
    if seconds >= 0.99995:
        return f"{seconds:.2f} s"
    if seconds < 0.0:
        return f"-{duration(-seconds)}"
    milliseconds = seconds * 1e3
    if milliseconds >= 0.9995:
        return f"{milliseconds:.{2 if milliseconds < 9.995 else 1}f} ms"
    return f"{seconds * 1e6:.0f} µs"


def size(num_bytes: float) -> str:
    """Decimal units: 512 B, 3.1 kB, 420 MB, 1.0 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.{1 if num_bytes < 99.95 * factor else 0}f} {unit}"
    return f"{num_bytes:.0f} B"


def bar(start: float, end: float, *, length: float, columns: int) -> str:
    """A bar from `start` to `end` on an axis of `length`, as thin as an eighth of a column; nothing when there is nothing between them."""
    if end <= start:
        return ""
    from_share, to_share = (max(0.0, min(1.0, place / length)) if length > 0 else 0.0 for place in (start, end))
    first = min(int(from_share * columns), columns - 1)
    eighths = max(1, round((to_share * columns - first) * 8))
    return " " * first + "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _rows_until_first_token(timing: inference_pb2.RequestTiming, usage: inference_pb2.Usage) -> list[_Row]:
    is_remote = bool(timing.prefill_worker_id)
    cached = timing.prefill_cached_tokens if is_remote else timing.decode_cached_tokens
    rows = []
    now_s = 0.0

    def stage(label: str, seconds: float, note: str = "", style: str = "") -> None:
        nonlocal now_s
        rows.append(_Row(label=label, seconds=seconds, bar=_bar(now_s, now_s + seconds, timing.ttft_s), note=note, style=style))
        now_s += seconds

    stage("tokenize", timing.tokenize_s, _count(usage.prompt_tokens, "token"), "cyan")
    stage("admission", timing.admission_s, style="cyan")
    if timing.retry_s:
        stage("retry", timing.retry_s, "lost on decode workers that failed", "red")
    stage("route", timing.route_s, f"{timing.predicted_cached_tokens} tokens expected in a cache", "cyan")
    stage("to decode", timing.to_decode_s)
    stage("decode queue", timing.decode_queue_s, "for a place and KV blocks", "yellow")
    if timing.prefill_retry_s:
        stage("prefill retry", timing.prefill_retry_s, "lost on prefill workers that failed", "red")
    if is_remote:
        stage("to prefill", timing.to_prefill_s)
    stage("prefill queue", timing.prefill_queue_s, style="yellow")
    stage("prefill", timing.prefill_s, f"{max(0, usage.prompt_tokens - cached)} tokens computed, {cached} cached", "green")
    if timing.kv_blocks:
        end_s = now_s + timing.transfer_tail_s
        rows.append(
            _Row(
                label="KV moved",
                seconds=timing.transfer_s,
                bar=_bar(max(0.0, end_s - timing.transfer_s), end_s, timing.ttft_s),
                note=_moved(timing),
                style="magenta",
            )
        )
        stage("transfer tail", timing.transfer_tail_s, "last blocks sent and landed", "magenta")
    else:
        rows.append(_Row(label="KV moved", note="nothing: all blocks were there" if is_remote else "nothing: computed on decode"))
    if is_remote:
        stage("from prefill", timing.prefill_return_s)
    stage("from decode", timing.first_token_return_s, "the first token's way to the router")
    stage("respond", timing.first_response_s, style="cyan")
    return rows


def _rows_after_first_token(timing: inference_pb2.RequestTiming, usage: inference_pb2.Usage, num_choices: int) -> list[_Row]:
    predicted = f"predicted {duration(timing.predicted_ttft_s)}" if timing.predicted_ttft_s else ""
    decode_s = timing.decode_s + timing.decode_retry_s
    lost = _Row(label="decode retry", seconds=timing.decode_retry_s, note="lost on decode workers that failed", style="red")
    retries = [lost] if timing.decode_retry_s else []
    tokens = _count(usage.completion_tokens, "token")
    # Choices decode side by side: each has its share of the tokens and all of the time.
    per_choice = usage.completion_tokens / max(1, num_choices)
    tpot = f", TPOT {duration(decode_s / (per_choice - 1))}" if per_choice > 1 else ""
    cached = f"cached: decode {timing.decode_cached_tokens}"
    if timing.prefill_worker_id:
        cached += f", prefill {timing.prefill_cached_tokens}"
    return [
        _Row(label="first token", seconds=timing.ttft_s, bar=" " * (_BAR - 1) + "◆", note=f"TTFT{'; ' + predicted if predicted else ''}"),
        _Row(label="decode", seconds=timing.decode_s, bar=" " * (_BAR - 1) + "▶", note=f"{tokens}{tpot}", style="green"),
        *retries,
        _Row(label="finish", seconds=timing.finish_s, note="from the last token to the last response"),
        _Row(label="total", seconds=timing.total_s, note=cached),
    ]


def _heading(timing: inference_pb2.RequestTiming) -> list[Text]:
    attempts = f" · {timing.attempts} attempts" if timing.attempts > 1 else ""
    heading = f"{timing.request_id} · {timing.router_id} → {_path(timing)} · seed {timing.seed}{attempts}"
    lines = [Text(line, style="bold") for line in textwrap.wrap(heading, WIDTH)]
    why = textwrap.wrap(f"why: {timing.route_reason or 'the router does not say'}", WIDTH, subsequent_indent="     ")
    return [*lines, *(Text(line) for line in why)]


def _axis(ttft_s: float) -> Text:
    end = duration(ttft_s)
    return Text(f"{'':{_LABEL + _DURATION + 1}}│0{end:>{_BAR - 1}}│", style="dim")


def _lines(row: _Row) -> list[Text]:
    seconds = "" if row.seconds is None else duration(row.seconds)
    notes = textwrap.wrap(row.note, WIDTH - _NOTE_COLUMN) or [""]
    line = Text(f"{row.label:<{_LABEL}}{seconds:>{_DURATION}} │")
    line.append(f"{row.bar:<{_BAR}}", style=row.style)
    line.append(f"│ {notes[0]}")
    line.rstrip()
    return [line, *(Text(" " * _NOTE_COLUMN + note) for note in notes[1:])]


def _bar(start_s: float, end_s: float, ttft_s: float) -> str:
    return bar(start_s, end_s, length=ttft_s, columns=_BAR)


def _path(timing: inference_pb2.RequestTiming) -> str:
    return f"{timing.prefill_worker_id} → {timing.decode_worker_id}" if timing.prefill_worker_id else timing.decode_worker_id


def _moved(timing: inference_pb2.RequestTiming) -> str:
    words = f"{_count(timing.kv_blocks, 'block')}, {size(timing.kv_bytes)}, {timing.kv_transport}"
    if timing.transfer_s > 0:
        bytes_per_s = timing.kv_bytes / timing.transfer_s
        words += f", {bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f", {bytes_per_s / 1e6:.1f} MB/s"
    return words


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
