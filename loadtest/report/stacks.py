"""What requests at the median and in the tail wait for, stage by stage.

Percentiles of stages do not add up to the percentile of their sum, so a stack is of the mean of each stage over the requests whose latency
lies around that percentile: those are real requests, and their stages add up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.attribution import stage_order
from loadtest.records import RequestRecord

PERCENTILES = (50, 90, 99)
NEIGHBOURHOOD = 0.02  # of all requests on each side of the percentile, and at least so many:
MIN_NEIGHBOURS = 2
MIN_SHARE = 0.01  # a stage below it in every stack is shown with the others of its kind

Stack = dict[str, float]  # stage → mean seconds


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage across the stacks. stage: None for the small ones together; seconds: by the stack's label."""

    name: str
    stage: str | None
    seconds: dict[str, float]


def stacks(
    records: Sequence[RequestRecord],
    latency_s: Callable[[RequestRecord], float | None],
    stages_of: Callable[[RequestRecord], Mapping[str, float]],
) -> dict[str, Stack]:
    """By "P50" and so on; empty when no record has stages."""
    timed = [(latency, record) for record in records if record.stages and (latency := latency_s(record)) is not None]
    timed.sort(key=lambda pair: pair[0])
    found: dict[str, Stack] = {}
    reach = max(MIN_NEIGHBOURS, round(NEIGHBOURHOOD * len(timed)))
    for percentile in PERCENTILES if timed else ():
        middle = round((len(timed) - 1) * percentile / 100)
        # At the end of the list the neighbourhood shrinks on both sides, or a P99 would lie below its name.
        side = min(reach, len(timed) - 1 - middle, middle)
        near = [record for _, record in timed[middle - side : middle + side + 1]]
        found[f"P{percentile}"] = {
            stage: float(np.mean([stages_of(record).get(stage, 0.0) for record in near]))
            for stage in stage_order(near)
            if any(stage in stages_of(record) for record in near)
        }
    return found


def rows(found: Mapping[str, Stack]) -> list[StageRow]:
    """The stages in order, those that are small in every stack joined at the end."""
    totals = {label: sum(stack.values()) for label, stack in found.items()}
    large: list[StageRow] = []
    small: list[str] = []
    for stage in dict.fromkeys(stage for stack in found.values() for stage in stack):
        seconds = {label: stack.get(stage, 0.0) for label, stack in found.items()}
        if any(value >= MIN_SHARE * totals[label] for label, value in seconds.items()):
            large.append(StageRow(stage.replace("_", " "), stage, seconds))
        else:
            small.append(stage)
    if small:
        rest = {label: sum(stack.get(stage, 0.0) for stage in small) for label, stack in found.items()}
        large.append(StageRow(f"{len(small)} other{'s' if len(small) > 1 else ''}, each below 1 %", None, rest))
    return large
