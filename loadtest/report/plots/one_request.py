"""The timeline of one request: what happened to it, one stage after the other."""

from typing import Any

import plotly.graph_objects as go

from loadtest.attribution import e2e_stages, stage_order
from loadtest.records import RequestRecord
from loadtest.report.text import milliseconds
from loadtest.report.theme import GREEN, figure, mark_x, stage_colour

# Shorter ones would be rows of nothing.
MIN_SHARE = 0.001


def timeline(record: RequestRecord) -> Any:
    """A row for each stage, from when it began to when it ended; needs `stages`.

    Stages follow one another without gaps, but for those beside others, which begin where the stage before them ended.
    """
    on_the_way = e2e_stages(record)
    total_s = max(sum(on_the_way.values()), record.e2e_s or 0.0) or 1e-9
    begun_s = 0.0
    rows: list[tuple[str, float, float]] = []
    for stage in stage_order([record]):
        seconds = record.stages[stage]
        if seconds >= MIN_SHARE * total_s:
            rows.append((stage, begun_s, seconds))
        if stage in on_the_way:
            begun_s += seconds
    bars = go.Bar(
        x=[seconds * 1e3 for _, _, seconds in rows],
        base=[begun * 1e3 for _, begun, _ in rows],
        y=[stage.replace("_", " ") for stage, _, _ in rows],
        orientation="h",
        marker={"color": [stage_colour(stage) for stage, _, _ in rows]},
        text=[milliseconds(seconds * 1e3) for _, _, seconds in rows],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: from %{base:,.4~g} ms, %{text}<extra></extra>",
    )
    plot = figure(bars, x_title="ms from when the request was due", y_title="stage", height=130 + 30 * len(rows), showlegend=False)
    plot.update_yaxes(autorange="reversed", showgrid=False)
    plot.update_xaxes(range=[0, total_s * 1e3 * 1.12])
    if record.ttft_s is not None:
        mark_x(plot, record.ttft_s * 1e3, "first token", colour=GREEN)
    return plot
