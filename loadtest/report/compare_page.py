"""The report of a comparison: what differs beyond chance, and the distributions one over the other."""

from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from loadtest.records import Outcome, RequestRecord
from loadtest.report import page as pages
from loadtest.report.compare import Comparison, Difference
from loadtest.report.plots import latency
from loadtest.report.text import DASH, milliseconds, percent, rate, size, three_digits
from loadtest.result import Result

Run = tuple[Result, Sequence[RequestRecord]]
HEAD = ("figure", "A", "B", "B − A", "of A", "95 % interval", "")


def compare_page(comparison: Comparison, before: Run, after: Run, *, tolerance: float) -> pages.Page:
    """tolerance: worsenings up to it pass (0.02: 2 %)."""
    page = pages.Page(title=f"A: {comparison.before}   B: {comparison.after}", subtitle="B is compared with A, under A's objective")
    if comparison.warnings:
        page.banners.append(pages.Banner(good=False, title="Compare with care.", points=comparison.warnings))
    worse = comparison.worse(tolerance)
    names = "; ".join(f"{difference.name} {_pair(difference)}" for difference in worse)
    title = f"B is worse in {len(worse)} figures." if worse else "B is not worse."
    text = f"Significant worsenings above {percent(tolerance)} count{': ' if worse else '.'}{names}"
    page.banners.append(pages.Banner(good=not worse, title=title, text=text))
    page.sections.append(_table(comparison))
    _distribution(page, "TTFT", before, after, lambda record: record.ttft_s)
    _distribution(page, "TPOT", before, after, lambda record: record.tpot_s)
    _distribution(page, "E2E", before, after, lambda record: record.e2e_s)
    return page


def print_comparison(console: Console, comparison: Comparison, *, tolerance: float) -> None:
    """The same table in a terminal."""
    for warning in comparison.warnings:
        console.print(f"[bold yellow]note:[/] {warning}", highlight=False)
    console.print(f"A: {comparison.before}\nB: {comparison.after}", highlight=False, markup=False)
    table = Table(HEAD[0], *(Column(name, justify="right", no_wrap=True) for name in HEAD[1:-1]), HEAD[-1], box=None, pad_edge=False)
    for difference in comparison.differences:
        cells, mark = _cells(difference), _mark(difference)
        table.add_row(*cells, style={"better": "green", "worse": "bold red"}.get(mark, ""))
    console.print(table)
    worse = comparison.worse(tolerance)
    names = ", ".join(difference.name for difference in worse)
    console.print(
        f"[bold red]worse by more than {percent(tolerance)}: {names}[/]" if worse else "[bold green]not worse[/]", highlight=False
    )


def _table(comparison: Comparison) -> pages.Section:
    rows = tuple(pages.Row(_cells(difference), _mark(difference)) for difference in comparison.differences)
    how = "Both ran one schedule, so they are resampled together, request by request. " if comparison.paired else ""
    text = (
        how + "Marked figures differ beyond chance: among all of these, equal runs would have any marked in one comparison of twenty. "
        "Intervals are of B − A: Newcombe's for shares of requests, else from resampled blocks of consecutive requests."
    )
    return pages.Section("figures", "Every figure", text, tables=(pages.Table(HEAD, rows, frozenset(range(1, 6))),))


def _distribution(page: pages.Page, name: str, before: Run, after: Run, of: Callable[[RequestRecord], float | None]) -> None:
    values_ms = {
        f"{letter}: {result.name}": np.array(
            [value * 1e3 for record in records if record.outcome is Outcome.COMPLETED and (value := of(record)) is not None]
        )
        for letter, (result, records) in (("A", before), ("B", after))
    }
    if not all(map(len, values_ms.values())):
        page.left_out.append((f"{name} distribution", "one of both tells it of no request"))
        return
    objective = before[0].objective
    limits_s = {"TTFT": None if objective.ttft_per_token_s else objective.ttft_s, "TPOT": objective.tpot_s}
    limit_s = limits_s.get(name)
    plot = latency.ecdf(values_ms, name=name, objective_ms=None if limit_s is None else limit_s * 1e3)
    page.sections.append(
        pages.Section(name.lower(), f"{name}: share of requests at or below", "", (pages.Plot(f"{name.lower()}-ecdf", plot),), wide=True)
    )


def _cells(difference: Difference) -> tuple[str, ...]:
    change, before = difference.change, difference.before
    is_relative = change is not None and before and difference.unit != "share"
    interval = DASH
    if difference.low is not None and difference.high is not None:
        interval = f"{_number(difference.low, difference.unit)} … {_number(difference.high, difference.unit)}"
    return (
        difference.name,
        _value(before, difference.unit),
        _value(difference.after, difference.unit),
        _signed(change, difference.unit),
        f"{change / before:+.1%}".replace("%", " %") if is_relative and change is not None and before else DASH,
        interval,
        _mark(difference),
    )


def _pair(difference: Difference) -> str:
    return f"{_value(difference.before, difference.unit)} → {_value(difference.after, difference.unit)}"


def _mark(difference: Difference) -> str:
    if not difference.significant or difference.better is None:
        return ""
    return "better" if difference.better else "worse"


def _value(value: float | None, unit: str) -> str:
    formats: dict[str, Callable[[float | None], str]] = {"share": percent, "ms": milliseconds, "/s": rate, "bytes": size}
    return formats.get(unit, three_digits)(value)


def _signed(value: float | None, unit: str) -> str:
    """A difference; of shares it is in points."""
    if value is None:
        return DASH
    if unit == "bytes":
        return ("−" if value < 0 else "+") + size(abs(value))
    return _number(value, unit) + {"share": " points", "ms": " ms", "/s": " /s"}.get(unit, "")


def _number(value: float, unit: str) -> str:
    """With its sign, in the unit that _signed() writes behind it."""
    scaled = value * 100 if unit == "share" else value
    return ("+" if scaled > 0 else "−" if scaled < 0 else "") + three_digits(abs(scaled))
