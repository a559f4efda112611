"""A measured figure beside its reference and its target, and how figures are printed. Knows nothing of what is measured."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One result.

    value, unit        median over `runs` measurements
    reference          median of the reference in the same run, same unit; `reference_name` says of what; None: none exists
    target             what `score` must reach ("at least") or stay within ("at most"); None: reported only
    score              what the target is about: value / reference, or value itself
    """

    name: str
    value: float
    unit: str
    runs: int
    reference: float | None = None
    reference_name: str = ""
    target: float | None = None
    at_most: bool = False
    on_ratio: bool = True

    @property
    def score(self) -> float:
        return self.value / self.reference if self.on_ratio and self.reference else self.value

    @property
    def reached(self) -> bool:
        if self.target is None:
            return True
        return self.score <= self.target if self.at_most else self.score >= self.target


def print_figures(figures: Sequence[Figure], conditions: dict[str, object], *, as_json: bool) -> None:
    """A table for people, or one JSON object with the conditions under which the figures were measured."""
    if as_json:
        rows = [{**asdict(figure), "score": figure.score, "reached": figure.reached} for figure in figures]
        print(json.dumps({"conditions": conditions, "figures": rows}, indent=2))
        return
    table = Table(caption=", ".join(f"{key} {value}" for key, value in conditions.items()))
    for heading in ("figure", "value", "reference", "score", "target", ""):
        table.add_column(heading)
    for figure in figures:
        reference = "" if figure.reference is None else f"{figure.reference:,.3g} {figure.reference_name}"
        sign = "≤" if figure.at_most else "≥"
        target = "" if figure.target is None else f"{sign} {figure.target:g}{'×' if figure.on_ratio else ''}"
        score = f"{figure.score:.2f}×" if figure.on_ratio and figure.reference else f"{figure.score:.3g}"
        verdict = "" if figure.target is None else "ok" if figure.reached else "SHORT"
        table.add_row(figure.name, f"{figure.value:,.4g} {figure.unit}", reference, score, target, verdict)
    Console().print(table)
