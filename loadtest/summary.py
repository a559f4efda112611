"""A run's figures, made from its records. What each word means: metrics.py.

Knows nothing of who sent the requests or how figures are shown.
"""

import msgspec

from collections.abc import Mapping, Sequence

from loadtest.metrics import Distribution, distribution, jain_index
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
    offered_rate, goodput                             per second of the schedule
    attainment                                        good ÷ offered, sent or not
    ttft_ms, tpot_ms, itl_ms, e2e_ms, lag_ms          itl: every gap of every request in one heap; as sent: ttft_as_sent_ms
    stages_ms                                         of completed requests that have stages
    broke                                             of requests that were not good: how many had this stage as the one that grew most
                                                      over its median
    residual_ms, residual_within                      client's end-to-end time − the sum of stages; the share within 1 % or 2 ms
    prefix_reuse, decode_reuse, reuse                 prompt tokens from caches of prefill, of decode, of any ÷ prompt tokens
    kv_bytes, kv_bytes_expected                       moved; by the blocks of the prompts that were computed elsewhere
    tokens_per_worker_s                               output tokens per second and worker
    """

    offered: int
    sent: int
    completed: int
    refused: int
    failed: int
    good: int
    duration_s: float
    offered_rate: float
    goodput: float
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
