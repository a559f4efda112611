"""The router's marks on a request's way, on clocks that the test sets."""

import time

import pytest

from protos.baton.v1 import decode_pb2, inference_pb2
from services.router.stages import Stages

UNIX_S = 1_700_000_000.0  # the wall clock when the monotonic one says 0
PREFILLED = decode_pb2.Prefilled(
    to_decode_s=0.25, decode_queue_s=0.5, prefill_retry_s=1.0, to_prefill_s=2.0, prefill_queue_s=4.0, prefill_s=8.0,
    transfer_tail_s=16.0, prefill_return_s=32.0, first_token_unix_s=UNIX_S + 200.0,
)  # fmt: skip


class Clocks:
    now = 100.0

    def at(self, now: float) -> None:
        self.now = now


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(time, "perf_counter", lambda: clocks.now)
    monkeypatch.setattr(time, "time", lambda: UNIX_S + clocks.now)
    return clocks


def filled(stages: Stages) -> inference_pb2.RequestTiming:
    timing = inference_pb2.RequestTiming()
    stages.fill(timing, PREFILLED)
    return timing


def told(timing: inference_pb2.RequestTiming, *names: str) -> list[float]:
    return [getattr(timing, name) for name in names]


def test_stages_when_all_goes_well_lie_between_the_marks(clocks: Clocks) -> None:
    clocks.at(110.0)
    stages = Stages(received_at=100.0, tokenize_s=3.0)
    clocks.at(105.0)
    stages.routing()
    clocks.at(107.0)
    assert stages.sent() == UNIX_S + 107.0
    clocks.at(211.0)
    stages.token(PREFILLED)
    clocks.at(212.0)
    stages.shown()
    clocks.at(230.0)
    stages.finished()
    clocks.at(234.0)
    timing = filled(stages)
    assert told(timing, "tokenize_s", "admission_s", "retry_s", "route_s") == [3.0, 2.0, 0.0, 2.0]
    assert told(timing, "first_token_return_s", "first_response_s", "decode_s", "decode_retry_s", "finish_s") == [11.0, 1.0, 19.0, 0.0, 4.0]
    assert told(timing, "received_unix_s", "first_token_unix_s", "responded_unix_s") == [UNIX_S + at for at in (100.0, 212.0, 234.0)]
    assert told(timing, "ttft_s", "total_s", "route_to_first_token_s") == [112.0, 134.0, 104.0]
    assert told(timing, "to_decode_s", "decode_queue_s", "prefill_retry_s", "to_prefill_s") == [0.25, 0.5, 1.0, 2.0]
    assert told(timing, "prefill_queue_s", "prefill_s", "transfer_tail_s", "prefill_return_s") == [4.0, 8.0, 16.0, 32.0]


def test_retry_when_attempts_fail_before_a_token_is_all_the_time_until_the_one_that_brought_it_was_routed(clocks: Clocks) -> None:
    stages = Stages(received_at=100.0, tokenize_s=0.0)
    for began in (101.0, 120.0):
        clocks.at(began)
        stages.routing()
        clocks.at(began + 1.0)
        stages.sent()
        clocks.at(began + 9.0)
        stages.failed()
    clocks.at(140.0)
    stages.routing()
    clocks.at(145.0)
    stages.routing()  # nobody was there: it has waited
    clocks.at(146.5)
    stages.sent()
    clocks.at(205.0)
    stages.token(PREFILLED)
    stages.shown()
    stages.finished()
    timing = filled(stages)
    assert told(timing, "admission_s", "retry_s", "route_s", "first_token_return_s") == [1.0, 44.0, 1.5, 5.0]
    assert told(timing, "decode_s", "decode_retry_s", "route_to_first_token_s") == [0.0, 0.0, 58.5]


def test_decode_retry_when_attempts_fail_after_a_token_is_the_time_without_one(clocks: Clocks) -> None:
    stages = Stages(received_at=100.0, tokenize_s=0.0)
    stages.routing()
    stages.sent()
    clocks.at(201.0)
    stages.token(PREFILLED)
    stages.shown()
    clocks.at(205.0)
    stages.failed()
    for routed, failed in ((206.0, 210.0), (211.0, None)):  # the second attempt brings nothing
        clocks.at(routed)
        stages.routing()
        stages.sent()
        if failed is not None:
            clocks.at(failed)
            stages.failed()
    clocks.at(215.0)
    stages.token(decode_pb2.Prefilled(first_token_unix_s=UNIX_S))
    stages.shown()
    clocks.at(222.0)
    stages.finished()
    clocks.at(223.0)
    timing = filled(stages)
    assert told(timing, "decode_s", "decode_retry_s", "finish_s") == [4.0 + 7.0, 10.0, 1.0]
    assert told(timing, "retry_s", "route_s", "first_token_return_s", "first_response_s") == [0.0, 0.0, 1.0, 0.0]
    assert timing.first_token_unix_s == UNIX_S + 201.0
