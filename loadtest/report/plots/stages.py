"""Where the time goes at the median and in the tail, and which stage broke the objective."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from loadtest.records import Outcome
from loadtest.report.stacks import Stack, rows
from loadtest.report.theme import GREY, figure, stage_colour


def stacked(found: Mapping[str, Stack], *, name: str) -> Any:
    """The stacks as bars, the median on top; small stages are joined."""
    bars = [_bar(row.name, row.seconds, GREY if row.stage is None else stage_colour(row.stage)) for row in rows(found)]
    plot = figure(
        *bars,
        x_title=f"ms; mean of the requests around that percentile of {name}",
        y_title=f"percentile of {name}",
        barmode="stack",
        height=250,
    )
    plot.update_yaxes(autorange="reversed", showgrid=False)
    return plot


def broke(counts: Mapping[str, int]) -> Any:
    """How many requests each stage made late, the most frequent on top."""
    bars = go.Bar(
        x=list(counts.values()),
        y=[cause.replace("_", " ") for cause in counts],
        orientation="h",
        marker={"color": [GREY if cause in set(Outcome) else stage_colour(cause) for cause in counts]},
        text=[f"{count:,}" for count in counts.values()],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:,} requests<extra></extra>",
    )
    plot = figure(bars, x_title="requests outside the objective", y_title="stage or end", height=120 + 34 * len(counts), showlegend=False)
    plot.update_yaxes(autorange="reversed", showgrid=False)
    return plot


def _bar(name: str, seconds: Mapping[str, float], colour: str) -> Any:
    return go.Bar(
        name=name,
        x=[round(value * 1e3, 4) for value in seconds.values()],
        y=list(seconds),
        orientation="h",
        marker={"color": colour},
        hovertemplate=f"{name}: %{{x:,.4~g}} ms<extra></extra>",
    )
