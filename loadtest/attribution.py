"""Where a request's time went and which stage made it late, from the stages in its record.

A stage counts towards the end-to-end time unless stages.py lists it for the first token alone: it lies beside others then (the first token
is delivered while decode goes on). Stages that stages.py does not know count, in the order in which records bring them.
"""

from collections.abc import Iterable, Sequence
from statistics import median

from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.stages import E2E_STAGES, STAGES, TTFT_STAGES, tolerance_s

_BESIDE = frozenset(TTFT_STAGES) - frozenset(E2E_STAGES)


def stage_order(records: Iterable[RequestRecord]) -> list[str]:
    """The stages that occur: those that are known in their order, then the others."""
    occurring = dict.fromkeys(stage for record in records for stage in record.stages)
    known = [stage.name for stage in STAGES if stage.name in occurring]
    return known + [stage for stage in occurring if stage not in known]


def ttft_stages(record: RequestRecord) -> dict[str, float]:
    """Seconds of the stages that the first token waited for."""
    return {stage: seconds for stage, seconds in record.stages.items() if stage in TTFT_STAGES}


def e2e_stages(record: RequestRecord) -> dict[str, float]:
    """Seconds of the stages that the end of the answer waited for."""
    return {stage: seconds for stage, seconds in record.stages.items() if stage not in _BESIDE}


def e2e_stages_s(record: RequestRecord) -> float:
    """What the stages say that the whole request took."""
    return sum(e2e_stages(record).values())


def is_accounted_for(record: RequestRecord) -> bool:
    """Whether its stages add up to the client's end-to-end time, within 1 % or 2 ms; False for one that did not complete."""
    return record.e2e_s is not None and abs(record.e2e_s - e2e_stages_s(record)) <= tolerance_s(record.e2e_s)


def causes(records: Sequence[RequestRecord], objective: Objective) -> dict[str, int]:
    """Why requests were not good, the most frequent first.

    A late first token: the stage before it with the greatest excess over its median among good requests. Else slow tokens: decode. A
    request that did not complete counts under its outcome, a late one without stages under "late first token".
    """
    good = [record for record in records if record.is_good(objective) and record.stages]
    usual_s = {stage: median(record.stages.get(stage, 0.0) for record in good) for stage in stage_order(good)}
    counts: dict[str, int] = {}
    for record in records:
        if not record.is_good(objective):
            cause = _cause(record, objective, usual_s)
            counts[cause] = counts.get(cause, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _cause(record: RequestRecord, objective: Objective, usual_s: dict[str, float]) -> str:
    if record.outcome is not Outcome.COMPLETED:
        return record.outcome.value
    if record.ttft_s is not None and record.ttft_s <= objective.first_token_within_s(record.input_tokens):
        return "decode"
    excess_s = {stage: seconds - usual_s.get(stage, 0.0) for stage, seconds in ttft_stages(record).items()}
    return max(excess_s, key=lambda stage: excess_s[stage]) if excess_s else "late first token"
