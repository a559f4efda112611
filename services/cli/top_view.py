"""What `baton top` shows, drawn from two samples of a router's status. Pure functions: rates are differences of counters.

A counter that fell belongs to a process that has started again; its rate is unknown until the next sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from protos.baton.v1 import common_pb2, status_pb2
from services.cli.timeline import duration, size

UNKNOWN = "–"
_OCCUPANCY_COLUMNS = 12
_LEGEND = "batch: tokens per step · KV blocks: █ in use ▒ cached ░ free"
_STATE_STYLES = {"up": "green", "draining": "yellow", "connecting": "yellow", "silent": "red", "incompatible": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Per second of the router's time between two samples; None: unknown. `hit_rate` is of prompt tokens, None while there are none."""

    requests: float | None
    prompt_tokens: float | None
    output_tokens: float | None
    kv_bytes: float | None
    hit_rate: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRates:
    """Per second of the time between a worker's two reports; `batch` is tokens decoded (prefill: computed) per step."""

    tokens: float | None
    steps: float | None
    batch: float | None


def rates(before: status_pb2.WatchStatusResponse | None, now: status_pb2.WatchStatusResponse) -> Rates:
    """What the router did between the samples."""
    if before is None or before.router_id != now.router_id or now.uptime_s <= before.uptime_s:
        return Rates(requests=None, prompt_tokens=None, output_tokens=None, kv_bytes=None, hit_rate=None)
    elapsed_s = now.uptime_s - before.uptime_s
    prompt_tokens = now.prompt_tokens - before.prompt_tokens
    return Rates(
        requests=(now.accepted - before.accepted) / elapsed_s,
        prompt_tokens=prompt_tokens / elapsed_s,
        output_tokens=(now.output_tokens - before.output_tokens) / elapsed_s,
        kv_bytes=(now.kv_bytes - before.kv_bytes) / elapsed_s,
        hit_rate=(now.cached_tokens - before.cached_tokens) / prompt_tokens if prompt_tokens else None,
    )


def worker_rates(
    before: status_pb2.WatchStatusResponse | None, now: status_pb2.WatchStatusResponse, worker: status_pb2.WorkerStatus
) -> WorkerRates:
    """What a worker of `now` did between its reports in the two samples."""
    unknown = WorkerRates(tokens=None, steps=None, batch=None)
    earlier = next((other for other in before.workers if other.worker == worker.worker), None) if before is not None else None
    if before is None or earlier is None or now.uptime_s <= before.uptime_s or not worker.HasField("load") or not earlier.HasField("load"):
        return unknown
    elapsed_s = (now.uptime_s - worker.report_age_s) - (before.uptime_s - earlier.report_age_s)
    steps = worker.load.engine_steps - earlier.load.engine_steps
    tokens = _tokens(worker) - _tokens(earlier)
    if elapsed_s <= 0 or steps < 0 or tokens < 0:
        return unknown
    return WorkerRates(tokens=tokens / elapsed_s, steps=steps / elapsed_s, batch=tokens / steps if steps else None)


def view(
    before: status_pb2.WatchStatusResponse | None, now: status_pb2.WatchStatusResponse, *, router: str, trouble: str = ""
) -> RenderableType:
    """The whole view. `trouble`: why there is no newer sample."""
    parts: list[RenderableType] = [_heading(now, router), _flow(rates(before, now), now), _latencies(now), Text()]
    parts += [_workers(before, now), Text(_LEGEND, style="dim")]
    if trouble:
        parts.append(Text(f"\n{trouble}", style="bold red"))
    return Group(*parts)


def _heading(now: status_pb2.WatchStatusResponse, router: str) -> Text:
    index = f"{now.index_entries:,} entries" if now.index_synchronized else "not synchronized"
    text = Text()
    text.append(f"{now.router_id or router}", style="bold")
    text.append(f" at {router} · {now.model_name or 'no model yet'} · up {_clock(now.uptime_s)} · index: {index}\n")
    text.append(f"in flight {now.in_flight}", style="bold")
    text.append(
        f" · accepted {now.accepted:,} · finished {now.finished:,} · failed {now.failed:,}"
        f" · cancelled {now.cancelled:,} · shed {now.shed:,}"
    )
    return text


def _flow(rate: Rates, now: status_pb2.WatchStatusResponse) -> Table:
    overall = f"{now.cached_tokens / now.prompt_tokens:.0%}" if now.prompt_tokens else UNKNOWN
    grid = Table.grid(padding=(0, 3))
    grid.add_row(
        _labelled("out", _per_second(rate.output_tokens, "tokens/s")),
        _labelled("prompts", _per_second(rate.prompt_tokens, "tokens/s")),
        _labelled("requests", _per_second(rate.requests, "/s")),
    )
    grid.add_row(
        _labelled("prefix hits", f"{UNKNOWN if rate.hit_rate is None else f'{rate.hit_rate:.0%}'} (since start {overall})"),
        _labelled("KV flow", UNKNOWN if rate.kv_bytes is None else f"{rate.kv_bytes / 1e6:,.1f} MB/s"),
        _labelled("KV moved", size(now.kv_bytes)),
    )
    return grid


def _latencies(now: status_pb2.WatchStatusResponse) -> Table:
    grid = Table.grid(padding=(0, 3))
    for name, summary in (("TTFT", now.ttft), ("TPOT", now.tpot)):
        values = [
            _labelled(f"p{percent}", duration(seconds) if summary.count else UNKNOWN)
            for percent, seconds in ((50, summary.p50_s), (90, summary.p90_s), (99, summary.p99_s))
        ]
        grid.add_row(Text(name, style="bold"), *values, Text(f"{summary.count} in the last minute", style="dim"))
    return grid


def _workers(before: status_pb2.WatchStatusResponse | None, now: status_pb2.WatchStatusResponse) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("worker", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("run/wait", "batch"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("KV blocks", no_wrap=True)
    for heading in ("tokens/s", "steps/s", "age"):
        table.add_column(heading, justify="right", no_wrap=True)
    for worker in now.workers:
        rate, load, has_load = worker_rates(before, now, worker), worker.load, worker.HasField("load")
        worker_id = worker.worker.worker_id
        table.add_row(
            worker_id if worker.role in worker_id else f"{worker_id} ({worker.role})",
            Text(worker.state, style=_STATE_STYLES.get(worker.state, "")),
            f"{load.num_running}/{load.num_waiting}" if has_load else UNKNOWN,
            _number(rate.batch),
            occupancy(load),
            _number(rate.tokens),
            _number(rate.steps),
            f"{worker.report_age_s:.1f} s" if has_load else UNKNOWN,
        )
    if not now.workers:
        table.add_row("none")
    return table


def occupancy(load: common_pb2.WorkerLoad) -> Text:
    """A bar of a pool's blocks by what they are, and the share that is in use or fenced off."""
    if not load.blocks_total:
        return Text(UNKNOWN)
    taken = load.blocks_owned + load.blocks_quarantined
    columns = _apportion([taken, load.blocks_cached, load.blocks_free], _OCCUPANCY_COLUMNS)
    text = Text()
    for character, count, style in zip("█▒░", columns, ("red", "cyan", "dim"), strict=True):
        text.append(character * count, style=style)
    text.append(f" {taken / load.blocks_total:4.0%}")
    return text


def _apportion(amounts: Sequence[int], columns: int) -> list[int]:
    """Whole columns that sum up; what is there at all gets one."""
    total = sum(amounts)
    if not total:
        return [0] * len(amounts)
    shares = [max(1, round(amount * columns / total)) if amount else 0 for amount in amounts]
    while sum(shares) != columns:
        step = 1 if sum(shares) < columns else -1
        shares[shares.index(max(shares))] += step
    return shares


def _tokens(worker: status_pb2.WorkerStatus) -> int:
    """What the worker is there for; a decode worker computes prompts too when it does both phases."""
    return worker.load.prefill_tokens if worker.role == "prefill" else worker.load.prefill_tokens + worker.load.decode_tokens


def _labelled(label: str, value: str) -> Text:
    return Text.assemble((f"{label} ", "dim"), value)


def _per_second(value: float | None, unit: str) -> str:
    return UNKNOWN if value is None else f"{_number(value)} {unit}".replace(" /s", "/s")


def _number(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.1f}" if 0 < value < 100 else f"{value:,.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
