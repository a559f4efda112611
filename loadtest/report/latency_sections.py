"""Sections of a report about latencies and their course over time."""

from collections.abc import Sequence

import numpy as np

from loadtest.records import RequestRecord
from loadtest.report.page import Plot, Section
from loadtest.report.plots import latency
from loadtest.report.plots import over_time as over_time_plots
from loadtest.result import Result


def ttft(result: Result, completed: Sequence[RequestRecord]) -> Section | None:
    objective = result.objective
    return _distribution(
        "ttft",
        "Time to first token",
        "From when the schedule wanted the request sent to its first token.",
        [record.ttft_s for record in completed],
        # One line can stand for the objective only when it is the same for all.
        None if objective.ttft_per_token_s else objective.ttft_s,
    )


def tpot(result: Result, completed: Sequence[RequestRecord]) -> Section | None:
    text = "Mean time between the tokens of one request: (last − first token) ÷ (tokens − 1)."
    return _distribution("tpot", "Time per output token", text, [record.tpot_s for record in completed], result.objective.tpot_s)


def over_time(result: Result, records: Sequence[RequestRecord]) -> Section | None:
    if not records:
        return None
    plots = (
        Plot("time-rates", over_time_plots.rates(records, result.faults), "Rates"),
        Plot("time-attainment", over_time_plots.attainment(records, result.objective, result.faults), "Attainment"),
        Plot("time-open", over_time_plots.open_requests(records, result.faults), "Backlog"),
    )
    text = "Dotted lines are faults that were made to happen; numbers are those of the table below." if result.faults else ""
    return Section("time", "Over time", text, plots, wide=True)


def _distribution(anchor: str, title: str, text: str, seconds: Sequence[float | None], objective_s: float | None) -> Section | None:
    values_ms = np.array([value * 1e3 for value in seconds if value is not None])
    if not len(values_ms):
        return None
    name, objective_ms = anchor.upper(), None if objective_s is None else objective_s * 1e3
    plots = (
        Plot(f"{anchor}-ecdf", latency.ecdf({name: values_ms}, name=name, objective_ms=objective_ms), "Share of requests at or below"),
        Plot(f"{anchor}-histogram", latency.histogram(values_ms, name=name, objective_ms=objective_ms), "How many took how long"),
    )
    return Section(anchor, title, text, plots)
