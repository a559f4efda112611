"""A request's stages between the client's send and receipt: hand-computed, from both forms of the record."""

import json
from typing import Any

import pytest

from loadtest.files import BadInput
from loadtest.stages import E2E_STAGES, STAGES, TTFT_STAGES, residual_s, stages_of, tolerance_s
from protos.baton.v1 import inference_pb2

# Powers of two, in the order of the stages from tokenize on: every sum of some of them names which.
MEASURED = (
    *("tokenize", "admission", "retry", "route", "to_decode", "decode_queue", "prefill_retry", "to_prefill"),
    *("prefill_queue", "prefill", "transfer_tail", "prefill_return", "first_token_return"),
    *("first_response", "decode", "decode_retry", "finish"),
)
UNTIL_FIRST_TOKEN_S = 2.0**13 - 1  # the first 13
SENT_S = 1_700_000_000.0
RECEIVED_S = SENT_S + 0.25
FIRST_TOKEN_S = RECEIVED_S + UNTIL_FIRST_TOKEN_S + 2**13
RESPONDED_S = RECEIVED_S + UNTIL_FIRST_TOKEN_S + 2**14 + 2**15 + 2**16
FIRST_S, DONE_S = FIRST_TOKEN_S + 0.5, RESPONDED_S + 0.125


def record(**fields: Any) -> inference_pb2.RequestTiming:
    stages = {f"{name}_s": 2.0**power for power, name in enumerate(MEASURED)}
    stamps = {"received_unix_s": RECEIVED_S, "first_token_unix_s": FIRST_TOKEN_S, "responded_unix_s": RESPONDED_S}
    return inference_pb2.RequestTiming(**{"request_id": "r", "seed": 7, **stages, **stamps, **fields})


def stages(timing: Any) -> dict[str, float]:
    return stages_of(timing, client_sent_unix_s=SENT_S, client_first_unix_s=FIRST_S, client_done_unix_s=DONE_S)


def test_stages_when_told_by_the_router_are_its_own_and_the_client_s_two_ends() -> None:
    known = stages(record())
    assert list(known) == [stage.name for stage in STAGES]
    assert {name: known[name] for name in MEASURED} == {name: 2.0**power for power, name in enumerate(MEASURED)}
    assert (known["send_lag"], known["request_hop"], known["first_response_hop"], known["response_hop"]) == (0.0, 0.25, 0.5, 0.125)


def test_stages_when_summed_are_the_client_s_ttft_and_e2e() -> None:
    known = stages(record())
    assert residual_s(known, TTFT_STAGES, FIRST_S - SENT_S) == 0.0
    assert residual_s(known, E2E_STAGES, DONE_S - SENT_S) == 0.0
    assert sum(known[name] for name in TTFT_STAGES) == 0.25 + UNTIL_FIRST_TOKEN_S + 2**13 + 0.5
    assert sum(known[name] for name in E2E_STAGES) == 0.25 + UNTIL_FIRST_TOKEN_S + 2**14 + 2**15 + 2**16 + 0.125


def test_residual_when_a_stage_is_missing_or_counted_twice_is_that_stage() -> None:
    for name, sign in ((name, sign) for name in MEASURED[:13] for sign in (-1, 1)):
        size = getattr(record(), f"{name}_s")
        changed = stages(record(**{f"{name}_s": size + sign * size}))
        assert residual_s(changed, TTFT_STAGES, FIRST_S - SENT_S) == -sign * size
        assert residual_s(changed, E2E_STAGES, DONE_S - SENT_S) == -sign * size


def test_stages_when_the_hosts_clocks_differ_sum_to_the_same() -> None:
    """Decode's clock an hour ahead of the router's: there and back cancel; and the client's a minute behind."""
    ahead = record(to_decode_s=16.0 + 3600, first_token_return_s=2.0**12 - 3600)
    late = stages_of(ahead, client_sent_unix_s=SENT_S - 60, client_first_unix_s=FIRST_S - 60, client_done_unix_s=DONE_S - 60)
    assert residual_s(late, TTFT_STAGES, FIRST_S - SENT_S) == residual_s(late, E2E_STAGES, DONE_S - SENT_S) == 0.0


def test_stages_when_read_from_an_http_answer_are_those_of_the_message() -> None:
    timing = record()
    fields = {field.name: getattr(timing, field.name) for field in timing.DESCRIPTOR.fields}
    assert stages(json.loads(json.dumps({**fields, "a_field_of_next_year": 1}))) == stages(timing)


@pytest.mark.parametrize(
    ("timing", "words"),
    [
        (inference_pb2.RequestTiming(), "timing, received_unix_s: is 0.0, not above 0"),
        (record(responded_unix_s=float("nan")), "timing, responded_unix_s: is nan"),
        ({"received_unix_s": "noon"}, "received_unix_s"),
        ({}, "the router does not measure stages"),
    ],
)
def test_stages_when_the_record_is_none_are_refused(timing: Any, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        stages(timing)
    assert words in str(caught.value)


@pytest.mark.parametrize(("client_s", "expected_s"), [(0.0, 0.002), (0.2, 0.002), (0.3, 0.003), (60.0, 0.6)])
def test_tolerance_when_a_request_is_long_is_a_hundredth_of_it(client_s: float, expected_s: float) -> None:
    assert tolerance_s(client_s) == pytest.approx(expected_s)
