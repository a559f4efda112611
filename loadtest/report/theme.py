"""Colours and the look that all plots share.

The colours are those of Okabe and Ito (2008), which people who confuse red and green tell apart too. Ink, grid and background belong to the
page's style sheet, which knows whether the reader's screen is light or dark; the colours below stand on both.
"""

import math
from typing import Any

import plotly.graph_objects as go

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, OLIVE, GREY, BROWN = "#CC79A7", "#56B4E9", "#9A9A2E", "#8C8C8C", "#8B5A2B"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, OLIVE, BROWN)
INK = "#555555"

# Where requests wait for their turn is warm, where they are computed is cool: a look at the stack says which of both it is.
_STAGE_COLOURS = {
    "admission": "#F2C14E",
    "decode_queue": ORANGE,
    "prefill_queue": VERMILION,
    "prefill": BLUE,
    "transfer_tail": GREEN,
    "decode": SKY,
    "retry": PURPLE,
    "decode_retry": PURPLE,
    "prefill_retry": PURPLE,
}
_OTHER_STAGE_COLOURS = (OLIVE, BROWN, "#6A51A3", "#B07AA1", "#4E9A8F", "#A0A0A0", "#C2A878", "#7F9FBF")


def stage_colour(stage: str) -> str:
    """The same in every plot of every report: from the stage's name alone."""
    return _STAGE_COLOURS.get(stage) or _OTHER_STAGE_COLOURS[sum(stage.encode()) % len(_OTHER_STAGE_COLOURS)]


def figure(*traces: Any, x_title: str, y_title: str, height: int = 300, **layout: Any) -> Any:
    """A plot with both axes named; anything else of plotly's layout by keyword."""
    axis = {"gridcolor": "rgba(128,128,128,0.22)", "zeroline": False, "automargin": True, "linecolor": "rgba(128,128,128,0.5)"}
    found = go.Figure(data=list(traces))
    found.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "inherit", "size": 12, "color": INK},
        margin={"l": 56, "r": 24, "t": 30, "b": 48},
        height=height,
        hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left", "traceorder": "normal"},
        xaxis={"title": {"text": x_title, "font": {"size": 13}}, **axis},
        yaxis={"title": {"text": y_title, "font": {"size": 13}, "standoff": 12}, **axis},
    )
    found.update_layout(**layout)
    return found


def mark_x(found: Any, x: float, label: str, *, colour: str = VERMILION, dash: str = "dash") -> None:
    """A vertical line, with words above the plot where they hide nothing."""
    found.add_vline(x=x, line={"color": colour, "width": 1.5, "dash": dash})
    found.add_annotation(
        # On a logarithmic axis plotly places lines by their value, and words by its exponent.
        x=math.log10(x) if found.layout.xaxis.type == "log" else x,
        y=1,
        yref="paper",
        yanchor="bottom",
        text=label,
        showarrow=False,
        font={"size": 12},
    )
