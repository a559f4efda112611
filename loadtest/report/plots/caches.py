"""Reuse of prompt tokens beside what the schedule permits, and KV bytes moved beside what should have moved."""

from typing import Any

import plotly.graph_objects as go

from loadtest.ceilings import Ceilings
from loadtest.report.text import percent, size
from loadtest.report.theme import BLUE, GREY, SKY, figure
from loadtest.summary import Summary


def reuse(summary: Summary, ceilings: Ceilings | None) -> Any:
    """The achieved ratio, by where the hits lay if that is known, above the ceilings."""
    achieved = "achieved"
    if summary.prefix_reuse is not None and summary.decode_reuse is not None:
        bars = [
            _bar("on prefill workers", {achieved: summary.prefix_reuse}, BLUE),
            _bar("on decode workers", {achieved: summary.decode_reuse}, SKY),
        ]
    else:
        bars = [_bar("any cache", {achieved: summary.reuse or 0.0}, BLUE)]
    totals = {achieved: summary.reuse if summary.reuse is not None else 0.0}
    if ceilings is not None:
        limits = {
            "ceiling: infinite cache": ceilings.infinite,
            "ceiling: one pool of this size": ceilings.one_pool,
            "floor: these pools in turn": ceilings.round_robin,
        }
        bars.append(_bar("what the schedule permits", limits, GREY))
        totals |= limits
    plot = figure(
        *bars, x_title="share of prompt tokens that came from a cache", y_title="", barmode="stack", height=150 + 34 * len(totals)
    )
    plot.update_xaxes(tickformat=".0%", range=[0, min(1.0, max(totals.values()) * 1.2) or 1.0])
    plot.update_yaxes(autorange="reversed", showgrid=False, title={"text": "cache"})
    _label(plot, totals, percent)
    return plot


def kv_bytes(moved: int, expected: int) -> Any:
    """Two bars that should be as long as each other."""
    totals = {"moved": float(moved), "expected": float(expected)}
    plot = figure(
        _bar("KV", {label: value / 2**20 for label, value in totals.items()}, BLUE, "%{x:,.4~g} MiB"),
        x_title="MiB of KV blocks from prefill to decode workers",
        y_title="KV bytes",
        showlegend=False,
        height=190,
    )
    plot.update_xaxes(range=[0, max(totals.values()) / 2**20 * 1.2 or 1.0])
    plot.update_yaxes(autorange="reversed", showgrid=False)
    _label(plot, {label: value / 2**20 for label, value in totals.items()}, lambda mebibytes: size(mebibytes * 2**20))
    return plot


def _bar(name: str, values: dict[str, float], colour: str, hover: str = "%{x:.1%}") -> Any:
    return go.Bar(
        name=name,
        x=list(values.values()),
        y=list(values),
        orientation="h",
        marker={"color": colour},
        hovertemplate=f"{name}: {hover}<extra></extra>",
    )


def _label(plot: Any, totals: dict[str, float], text: Any) -> None:
    """Beside each whole bar: a stack's parts would label each of themselves."""
    for label, value in totals.items():
        plot.add_annotation(x=value, y=label, text=text(value), showarrow=False, xanchor="left", xshift=6)
