"""What was offered and what came of it while the run went on, with the faults that were made to happen."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.report.theme import BLUE, GREEN, ORANGE, PURPLE, VERMILION, figure, mark_x
from loadtest.result import FaultMark

MAX_STRETCHES = 60
WORDS_SHARE = 0.12
X_TITLE = "seconds from the start of the run"


def stretches(records: Sequence[RequestRecord]) -> NDArray[np.float64]:
    """Edges of equal stretches of a round length, from the start to the last answer."""
    end_s = max([record.at_s for record in records] + [record.finished_s for record in records if record.finished_s is not None])
    rough_s = max(end_s, 1e-3) / MAX_STRETCHES
    power = 10.0 ** np.floor(np.log10(rough_s))
    width_s = next(step * power for step in (1, 2, 5, 10) if step * power >= rough_s)
    edges_s: NDArray[np.float64] = np.arange(int(end_s / width_s) + 2) * width_s
    return edges_s


def rates(records: Sequence[RequestRecord], faults: Sequence[FaultMark]) -> Any:
    """Requests per second: offered, completed, good by their end, and those that came to nothing."""
    edges_s = stretches(records)
    lines: list[tuple[str, str, list[float]]] = [
        ("offered", BLUE, [record.at_s for record in records]),
        ("completed", GREEN, _ends(records, Outcome.COMPLETED)),
        ("refused", ORANGE, _ends(records, Outcome.REFUSED)),
        ("failed", VERMILION, _ends(records, Outcome.FAILED)),
    ]
    traces = [
        _line(edges_s, np.histogram(times, edges_s)[0] / np.diff(edges_s), name, colour, "%{y:,.3~g} /s")
        for name, colour, times in lines
        if times
    ]
    found = figure(*traces, x_title=X_TITLE, y_title="requests per second", hovermode="x unified")
    found.update_yaxes(rangemode="tozero")
    _finish(found, edges_s, faults)
    return found


def attainment(records: Sequence[RequestRecord], objective: Objective, faults: Sequence[FaultMark]) -> Any:
    """The share of the requests due in each stretch that were good."""
    edges_s = stretches(records)
    due, _ = np.histogram([record.at_s for record in records], edges_s)
    good, _ = np.histogram([record.at_s for record in records if record.is_good(objective)], edges_s)
    shares = np.divide(good, due, out=np.full(len(due), np.nan), where=due > 0)
    line = _line(edges_s, shares, "attainment", GREEN, "%{y:.1%}")
    found = figure(line, x_title=X_TITLE + ", by when requests were due", y_title="share within the objective", showlegend=False)
    found.update_yaxes(range=[0, 1.05], tickformat=".0%")
    _finish(found, edges_s, faults)
    return found


def open_requests(records: Sequence[RequestRecord], faults: Sequence[FaultMark]) -> Any:
    """How many requests had arrived and not ended."""
    edges_s = stretches(records)
    begun = np.searchsorted(np.sort([record.at_s for record in records if record.sent_s is not None]), edges_s, "right")
    ends_s = [record.finished_s for record in records if record.sent_s is not None and record.finished_s is not None]
    ended = np.searchsorted(np.sort(ends_s), edges_s, "right")
    line = go.Scatter(
        x=edges_s.round(4).tolist(),
        y=(begun - ended).tolist(),
        name="open",
        mode="lines",
        line={"color": PURPLE, "width": 2},
        fill="tozeroy",
        fillcolor="rgba(204,121,167,0.18)",
        hovertemplate="%{y:,} open<extra></extra>",
    )
    found = figure(line, x_title=X_TITLE, y_title="open requests", showlegend=False)
    found.update_yaxes(rangemode="tozero")
    _finish(found, edges_s, faults)
    return found


def _ends(records: Sequence[RequestRecord], outcome: Outcome) -> list[float]:
    return [record.finished_s for record in records if record.outcome is outcome and record.finished_s is not None]


def _line(edges_s: NDArray[np.float64], values: NDArray[np.float64], name: str, colour: str, hover: str) -> Any:
    return go.Scatter(
        x=((edges_s[1:] + edges_s[:-1]) / 2).round(4).tolist(),
        y=[None if np.isnan(value) else round(float(value), 6) for value in values],
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"size": 4},
        hovertemplate=hover,
    )


def _finish(found: Any, edges_s: NDArray[np.float64], faults: Sequence[FaultMark]) -> None:
    """The same span of time for all plots, and the faults: in words where these have room, else by their number in the table."""
    found.update_xaxes(range=[0, float(edges_s[-1])])
    found.update_yaxes(automargin=False)
    found.update_layout(margin={"l": 72})  # one moment lies in one place in all three
    times_s = sorted(fault.at_s for fault in faults)
    has_room = all(later - earlier >= WORDS_SHARE * edges_s[-1] for earlier, later in pairwise(times_s))
    for number, fault in enumerate(faults, 1):
        mark_x(found, fault.at_s, f"{fault.kind} {fault.worker_id}" if has_room else str(number), dash="dot")
    if faults:  # above their words
        found.update_layout(legend={"y": 1.12}, margin={"t": 52 if found.layout.showlegend is not False else 30})
