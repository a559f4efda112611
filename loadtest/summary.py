"""A run's figures, made from its records. What each word means: metrics.py.

Knows nothing of who sent the requests or how figures are shown.
"""

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from loadtest.attribution import causes, e2e_stages_s, is_accounted_for, stage_order
from loadtest.metrics import Distribution, distribution, jain_index, wilson_interval
from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.stages import TTFT_STAGES


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant's share. attainment: good ÷ offered."""

    offered: int
    good: int
    attainment: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """
    offered, sent, completed, refused, failed, good   requests; good: completed within the objective
    duration_s, span_s                                of the schedule's arrivals; from its start until the last answer ended
    offered_rate, goodput, achieved_rate              per second of the schedule; completed per second of the span. None: it took no time
    attainment, attainment_low, attainment_high       good ÷ offered, sent or not; Wilson's 95 % interval
    within_ttft, within_tpot                          shares of offered that completed and kept this part of the objective
    ttft_ms, tpot_ms, itl_ms, e2e_ms, lag_ms          itl: every gap of every request in one heap; as sent: ttft_as_sent_ms
    stages_ms                                         of completed requests that have stages; one that a request lacks is zero
    broke                                             of requests that were not good: how many had this stage as the one that grew most
                                                      over its median; without stages, what became of them
    residual_ms, residual_within                      client's end-to-end time − the sum of stages; the share within 1 % or 2 ms
    prefix_reuse, decode_reuse, reuse                 prompt tokens from caches of prefill, of decode, of any ÷ all; None: not told
    reuse_request_mean                                mean of each request's own ratio
    kv_bytes, kv_bytes_expected                       moved; by the blocks of the prompts that were computed elsewhere, if every
                                                      layer keeps all tokens (of layers with windows less moves)
    tokens_per_worker_s                               output tokens ÷ (workers × span)
    tenants, jain                                     empty and None where requests have no tenants
    """

    offered: int
    sent: int
    completed: int
    refused: int
    failed: int
    good: int
    duration_s: float
    offered_rate: float | None
    goodput: float | None
    attainment: float
    ttft_ms: Distribution | None
    ttft_as_sent_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    lag_ms: Distribution | None
    stages_ms: dict[str, Distribution]
    broke: dict[str, int]
    residual_ms: Distribution | None
    residual_within: float | None
    prefix_reuse: float | None
    decode_reuse: float | None
    reuse: float | None
    kv_bytes: int
    kv_bytes_expected: int | None
    output_tokens: int
    tokens_per_worker_s: float | None
    tenants: dict[str, Tenant]
    jain: float | None
    span_s: float = 0.0
    achieved_rate: float | None = None
    attainment_low: float = 0.0
    attainment_high: float = 1.0
    within_ttft: float = 0.0
    within_tpot: float = 0.0
    reuse_request_mean: float | None = None

    @property
    def breaker(self) -> str | None:
        """The stage that broke the objective most often. None when none did."""
        stages = {cause: count for cause, count in self.broke.items() if cause in TTFT_STAGES or cause == "decode"}
        return max(stages, key=lambda stage: stages[stage]) if stages else None


def summarize(
    records: Sequence[RequestRecord],
    *,
    objective: Objective,
    duration_s: float,
    num_workers: int | None = None,
    kv_bytes_expected: int | None = None,
) -> Summary:
    """The figures of records, one for each request that was offered.

    duration_s          of the schedule: from its start to its last arrival
    num_workers         that served, of all kinds
    kv_bytes_expected   None: not known
    """
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    staged = [record for record in completed if record.stages]
    good = sum(record.is_good(objective) for record in records)
    span_s = max([duration_s, *(record.finished_s for record in records if record.finished_s is not None)])
    output_tokens = sum(record.output_tokens for record in records)
    worker_s = (num_workers or 0) * span_s
    low, high = wilson_interval(good, len(records))
    tenants = _tenants(records, objective)
    ttft = [record for record in completed if record.ttft_s is not None and _in_time(record, objective)]
    tpot = [record for record in completed if record.tpot_s is None or record.tpot_s <= objective.tpot_s]
    prefix_reuse, decode_reuse, reuse, request_mean = _reuse(completed)
    return Summary(
        offered=len(records),
        sent=sum(record.sent_s is not None for record in records),
        completed=len(completed),
        refused=sum(record.outcome is Outcome.REFUSED for record in records),
        failed=sum(record.outcome is Outcome.FAILED for record in records),
        good=good,
        duration_s=duration_s,
        span_s=span_s,
        offered_rate=_ratio(len(records), duration_s),
        goodput=_ratio(good, duration_s),
        achieved_rate=_ratio(len(completed), span_s),
        attainment=_ratio(good, len(records)) or 0.0,
        attainment_low=low,
        attainment_high=high,
        within_ttft=_ratio(len(ttft), len(records)) or 0.0,
        within_tpot=_ratio(len(tpot), len(records)) or 0.0,
        ttft_ms=_milliseconds(record.ttft_s for record in completed),
        ttft_as_sent_ms=_milliseconds(
            record.first_token_s - record.sent_s for record in completed if record.first_token_s is not None and record.sent_s is not None
        ),
        tpot_ms=_milliseconds(record.tpot_s for record in completed),
        itl_ms=_milliseconds(gap for record in completed for gap in record.gaps_s),
        e2e_ms=_milliseconds(record.e2e_s for record in completed),
        lag_ms=_milliseconds(record.lag_s for record in records),
        stages_ms={
            stage: found
            for stage in stage_order(staged)
            if (found := _milliseconds(record.stages.get(stage, 0.0) for record in staged)) is not None
        },
        broke=causes(records, objective),
        residual_ms=_milliseconds(record.e2e_s - e2e_stages_s(record) for record in staged if record.e2e_s is not None),
        residual_within=_ratio(sum(map(is_accounted_for, staged)), len(staged)),
        prefix_reuse=prefix_reuse,
        decode_reuse=decode_reuse,
        reuse=reuse,
        reuse_request_mean=request_mean,
        kv_bytes=sum(record.kv_bytes for record in records),
        kv_bytes_expected=kv_bytes_expected,
        output_tokens=output_tokens,
        tokens_per_worker_s=_ratio(output_tokens, worker_s),
        tenants=tenants,
        jain=jain_index([tenant.attainment for tenant in tenants.values()]),
    )


def _in_time(record: RequestRecord, objective: Objective) -> bool:
    return record.ttft_s is not None and record.ttft_s <= objective.first_token_within_s(record.input_tokens)


def _tenants(records: Sequence[RequestRecord], objective: Objective) -> dict[str, Tenant]:
    """By name; empty when nobody has one."""
    counts: dict[str, list[int]] = {}
    for record in records:
        count = counts.setdefault(record.tenant, [0, 0])
        count[0] += 1
        count[1] += record.is_good(objective)
    if set(counts) <= {""}:
        return {}
    return {name: Tenant(offered=offered, good=good, attainment=good / offered) for name, (offered, good) in sorted(counts.items())}


def _reuse(completed: Sequence[RequestRecord]) -> tuple[float | None, float | None, float | None, float | None]:
    """From prefill's caches, decode's, any; the request mean. None for what the server did not tell."""
    told = [(record, record.reused_tokens) for record in completed if record.input_tokens]
    known = [(record, reused) for record, reused in told if reused is not None]
    input_tokens = sum(record.input_tokens for record, _ in known)
    on_decode = sum(reused for record, reused in known if record.is_prefilled_on_decode)
    total = sum(reused for _, reused in known)
    # A server that counts hits but not where they lay: to say zero for both would be a lie.
    is_split = any(record.decode_worker_id for record, _ in known) or not total
    return (
        _ratio(total - on_decode, input_tokens) if is_split else None,
        _ratio(on_decode, input_tokens) if is_split else None,
        _ratio(total, input_tokens),
        _ratio(sum(reused / record.input_tokens for record, reused in known), len(known)),
    )


def _milliseconds(seconds: Iterable[float | None]) -> Distribution | None:
    return distribution(np.fromiter((value * 1e3 for value in seconds if value is not None), dtype=np.float64))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
