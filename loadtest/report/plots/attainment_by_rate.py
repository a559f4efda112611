"""How much load a cluster takes: attainment against the offered rate, over several runs or the probes of a capacity search."""

from collections.abc import Sequence
from typing import Any

import msgspec
import plotly.graph_objects as go

from loadtest.files import BadInput
from loadtest.metrics import wilson_interval
from loadtest.report.theme import BLUE, figure
from loadtest.result import Result


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One rate that was tried. low, high: the 95 % interval of the attainment; n: requests."""

    rate: float
    attainment: float
    low: float
    high: float
    n: int


def probes_of(results: Sequence[Result]) -> list[Probe]:
    """Of searches their probes (`extra["probes"]`), of other runs themselves; by rate. Raises BadInput for probes of another shape."""
    found: list[Probe] = []
    for result in results:
        if "probes" in result.extra:
            try:
                found += msgspec.convert(result.extra["probes"], type=list[Probe])
            except msgspec.ValidationError as error:
                raise BadInput(f"{result.name}, extra.probes: {error}") from None
        elif result.summary.offered_rate is not None:
            summary = result.summary
            low, high = wilson_interval(summary.good, summary.offered)
            found.append(Probe(rate=result.summary.offered_rate, attainment=summary.attainment, low=low, high=high, n=summary.offered))
    return sorted(found, key=lambda probe: probe.rate)


def attainment_by_rate(probes: Sequence[Probe]) -> Any:
    """A point for each probe, with its interval."""
    points = go.Scatter(
        x=[probe.rate for probe in probes],
        y=[probe.attainment for probe in probes],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [max(probe.high - probe.attainment, 0.0) for probe in probes],
            "arrayminus": [max(probe.attainment - probe.low, 0.0) for probe in probes],
            "color": BLUE,
            "thickness": 1.2,
        },
        mode="lines+markers",
        line={"color": BLUE, "width": 1.5},
        marker={"size": 8},
        customdata=[probe.n for probe in probes],
        hovertemplate="%{x:,.4~g} /s: %{y:.1%} of %{customdata:,} requests<extra></extra>",
    )
    plot = figure(points, x_title="offered rate, requests per second", y_title="attainment, 95 % interval", showlegend=False)
    plot.update_yaxes(range=[0, 1.05], tickformat=".0%")
    plot.update_xaxes(rangemode="tozero")
    return plot
