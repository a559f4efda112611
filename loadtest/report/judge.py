"""A result under another objective than the one it was made with: other tools' files have none, and comparisons need the same for both."""

from collections.abc import Sequence

import msgspec

from loadtest.records import Objective, RequestRecord
from loadtest.result import Result
from loadtest.summary import summarize
from loadtest.verdict import verdict


def judged_by(result: Result, records: Sequence[RequestRecord], objective: Objective) -> Result:
    """Summary and verdict anew; what else made the run invalid stays so."""
    if objective == result.objective:
        return result
    before = set(verdict(records, result.objective).problems)
    again = verdict(records, objective)
    others = tuple(problem for problem in result.verdict.problems if problem not in before)
    return msgspec.structs.replace(
        result,
        objective=objective,
        verdict=msgspec.structs.replace(again, valid=again.valid and not others, problems=again.problems + others),
        summary=summarize(
            records,
            objective=objective,
            duration_s=result.schedule.duration_s,
            num_workers=result.cluster.num_workers,
            kv_bytes_expected=result.summary.kv_bytes_expected,
        ),
    )
