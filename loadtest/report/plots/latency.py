"""How latencies are distributed, and what part of them keeps the objective."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from loadtest.report.theme import BLUE, PALETTE, figure, mark_x

MAX_POINTS = 1500
NUM_BARS = 60
# A few slow requests would squeeze all others into the first bar.
LOG_SPREAD = 20.0


def ecdf(latencies_ms: Mapping[str, NDArray[np.float64]], *, name: str, objective_ms: float | None) -> Any:
    """The share of requests at or below each latency, one curve for each run, which `latencies_ms` has by its name."""
    curves = []
    for (label, values), colour in zip(latencies_ms.items(), PALETTE, strict=False):
        ordered = np.sort(values)
        # Evenly over the shares, and every one of the slowest, which is what a tail is looked at for.
        kept = np.unique(np.concatenate([np.linspace(0, len(ordered) - 1, MAX_POINTS).astype(int), np.arange(len(ordered))[-100:]]))
        curves.append(
            go.Scatter(
                x=ordered[kept].round(4).tolist(),
                y=((kept + 1) / len(ordered)).round(6).tolist(),
                name=label,
                mode="lines",
                line={"color": colour, "width": 2, "shape": "hv"},
                hovertemplate="%{y:.2%} at most %{x:,.4~g} ms<extra></extra>",
            )
        )
    found = figure(*curves, x_title=_axis(name, latencies_ms), y_title="share of requests", showlegend=len(curves) > 1)
    found.update_yaxes(range=[0, 1.02], tickformat=".0%")
    _finish(found, latencies_ms, objective_ms)
    return found


def histogram(values_ms: NDArray[np.float64], *, name: str, objective_ms: float | None) -> Any:
    """How many requests had each latency; bars of equal width on the axis, be it linear or logarithmic."""
    shown = {"": values_ms}
    low, high = float(values_ms.min()), float(values_ms.max())
    if high <= low:
        low, high = low * 0.95 - 1e-3, high * 1.05 + 1e-3
    edges = np.geomspace(low, high, NUM_BARS + 1) if _is_wide(shown) else np.linspace(low, high, NUM_BARS + 1)
    counts, _ = np.histogram(values_ms, edges)
    bars = go.Bar(
        x=((edges[1:] + edges[:-1]) / 2).round(4).tolist(),
        y=counts.tolist(),
        width=np.diff(edges).round(6).tolist(),
        marker={"color": BLUE, "opacity": 0.75, "line": {"width": 0}},
        customdata=np.stack([edges[:-1], edges[1:]], axis=1).round(3).tolist(),
        hovertemplate="%{y:,} requests, %{customdata[0]:,.4~g} to %{customdata[1]:,.4~g} ms<extra></extra>",
    )
    found = figure(bars, x_title=_axis(name, shown), y_title="requests in each bar", bargap=0)
    _finish(found, shown, objective_ms)
    return found


def _is_wide(latencies_ms: Mapping[str, NDArray[np.float64]]) -> bool:
    joined = np.concatenate(list(latencies_ms.values()))
    return bool(joined.min() > 0 and joined.max() / np.median(joined) > LOG_SPREAD)


def _axis(name: str, latencies_ms: Mapping[str, NDArray[np.float64]]) -> str:
    return f"{name}, ms (logarithmic)" if _is_wide(latencies_ms) else f"{name}, ms"


def _finish(found: Any, latencies_ms: Mapping[str, NDArray[np.float64]], objective_ms: float | None) -> None:
    if _is_wide(latencies_ms):
        found.update_xaxes(type="log", dtick="D2", exponentformat="none")
    joined = np.concatenate(list(latencies_ms.values()))
    # Off the scale a line would squeeze the curve for nothing.
    if objective_ms is not None and objective_ms <= 5 * float(joined.max()):
        mark_x(found, objective_ms, "objective")
