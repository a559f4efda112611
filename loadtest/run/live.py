"""What a run looks like while it goes on: offered and achieved rate, attainment so far, where time goes, each worker, faults.

Draws from what the conductor and the watch have gathered; decides nothing.
"""

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loadtest.metrics import distribution
from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.run.conductor import Tally
from loadtest.run.faults import Strike
from loadtest.run.watch import Watch
from loadtest.schedule import Schedule

RECENT_S = 10.0
BAR_WIDTH = 40
NO_BREAK = "\N{NO-BREAK SPACE}"
COLOURS = ("blue", "cyan", "yellow", "magenta", "green", "red", "bright_black", "bright_blue", "bright_cyan", "bright_magenta")
SHOWN_STAGES, SHOWN_WORKERS, SHOWN_FAULTS = 8, 16, 6


class LiveView:
    """One frame each time it is asked."""

    def __init__(self, schedule: Schedule, objective: Objective, tally: Tally, watch: Watch | None, strikes: Sequence[Strike]) -> None:
        self._arrivals = sorted(request.at_s for request in schedule.requests if request.after is None)
        self._num_planned = len(schedule)
        self._objective, self._tally, self._watch, self._strikes = objective, tally, watch, strikes

    def __rich__(self) -> RenderableType:
        elapsed_s, records = self._tally.elapsed_s, self._tally.records
        recent = [record for record in records if record.finished_s is not None and record.finished_s > elapsed_s - RECENT_S]
        parts: list[RenderableType] = [self._head(elapsed_s, records, recent), self._latencies(recent), self._stages(recent)]
        if self._watch is not None and self._watch.latest is not None:
            parts.append(self._workers(self._watch))
        if self._strikes:
            marks = "   ".join(f"{strike.at_s:.0f} s {strike.kind} {strike.worker_id}" for strike in self._strikes[-SHOWN_FAULTS:])
            parts.append(Text(f"faults: {marks}", style="red"))
        return Panel(Group(*parts), title=f"load test, {max(0.0, elapsed_s):.0f} s", border_style="dim")

    def _head(self, elapsed_s: float, records: Sequence[RequestRecord], recent: Sequence[RequestRecord]) -> RenderableType:
        span_s = min(RECENT_S, max(1e-3, elapsed_s))
        offered = sum(elapsed_s - span_s < at_s <= elapsed_s for at_s in self._arrivals) / span_s
        achieved = sum(record.outcome is Outcome.COMPLETED for record in recent) / span_s
        good = sum(record.is_good(self._objective) for record in records)
        refused = sum(record.outcome is Outcome.REFUSED for record in records)
        failed = sum(record.outcome is Outcome.FAILED for record in records)
        table = Table.grid(padding=(0, 3))
        table.add_row(
            f"offered [b]{offered:.1f}[/b] requests/s",
            f"answered [b]{achieved:.1f}[/b] /s",
            f"attainment so far [b]{good / len(records):.1%}[/b]" if records else "attainment so far —",
            f"open {sum(self._tally.open)}",
            f"refused {refused}",
            f"[{'red' if failed else 'default'}]failed {failed}",
        )
        done = ProgressBar(total=max(1, self._num_planned), completed=len(records), width=BAR_WIDTH)
        progress = Table.grid(padding=(0, 2))
        progress.add_row(done, f"{len(records)} of {self._num_planned} requests ended (rates: last {RECENT_S:.0f} s)")
        return Group(progress, table)

    def _latencies(self, recent: Sequence[RequestRecord]) -> RenderableType:
        table = Table("ms, last 10 s", "p50", "p90", "p99", box=None, header_style="dim", padding=(0, 2))
        for name, values in (
            ("TTFT", [r.ttft_s for r in recent if r.ttft_s is not None]),
            ("TPOT", [r.tpot_s for r in recent if r.tpot_s is not None]),
            ("send lag", [r.lag_s for r in recent if r.lag_s is not None]),
        ):
            found = distribution(values)
            cells = ("—",) * 3 if found is None else tuple(f"{value * 1e3:,.1f}" for value in (found.p50, found.p90, found.p99))
            table.add_row(name, *cells)
        return table

    def _stages(self, recent: Sequence[RequestRecord]) -> RenderableType:
        totals: dict[str, float] = {}
        for record in recent:
            for name, seconds in record.stages.items():
                totals[name] = totals.get(name, 0.0) + seconds
        whole = sum(totals.values())
        if not whole:
            return Text("stages: the target tells none", style="dim")
        largest = sorted(totals, key=lambda name: -totals[name])[:SHOWN_STAGES]
        bar, legend = Text("stages  "), Text("        ")
        for colour, name in zip(COLOURS, (name for name in totals if name in largest), strict=False):
            bar.append("█" * round(BAR_WIDTH * 2 * totals[name] / whole), style=colour)
            label = f"{name} {totals[name] / whole:.0%}".replace("_", NO_BREAK).replace(" ", NO_BREAK)
            legend.append(f"■{NO_BREAK}", style=colour).append(f"{label}  ")
        return Group(bar, legend)

    def _workers(self, watch: Watch) -> RenderableType:
        assert watch.latest is not None
        table = Table("worker", "state", "running", "waiting", "KV blocks in use", box=None, header_style="dim", padding=(0, 2))
        workers = sorted(watch.latest.workers, key=lambda worker: worker.worker.worker_id)
        for worker in workers[:SHOWN_WORKERS]:
            load = worker.load
            used = load.blocks_owned + load.blocks_quarantined
            bar = ProgressBar(total=max(1, load.blocks_total), completed=used, width=20)
            kv = Table.grid(padding=(0, 1))
            kv.add_row(bar, f"{used} of {load.blocks_total}, {load.blocks_cached} cached")
            style = "" if worker.state == "up" else "red"
            table.add_row(worker.worker.worker_id, Text(worker.state, style=style), str(load.num_running), str(load.num_waiting), kv)
        if len(workers) > SHOWN_WORKERS:
            table.add_row(f"… {len(workers) - SHOWN_WORKERS} more", "", "", "", "")
        return table


def plain_line(tally: Tally, num_planned: int, objective: Objective) -> str:
    """The same in one line, for logs and pipes."""
    records = tally.records
    good = sum(record.is_good(objective) for record in records)
    share = f"{good / len(records):.1%}" if records else "—"
    counts = f"{sum(tally.sent)} of {num_planned} sent, {sum(tally.open)} open, {len(records)} ended, good {share}"
    return f"{time.strftime('%H:%M:%S')} {tally.elapsed_s:6.0f} s: {counts}"
