"""Faults as users write them, and what they cost, by records whose story is known."""

import pytest

from loadtest.files import BadInput
from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.run.faults import Fault, duplicated, pid_of, recovered_s, wrong_answers
from loadtest.run.watch import Watch
from protos.baton.v1 import common_pb2, status_pb2

OBJECTIVE = Objective(ttft_s=1.0, tpot_s=0.1)


def record(index: int, at_s: float, *, ttft_s: float = 0.1, outcome: Outcome = Outcome.COMPLETED, digest: str = "d") -> RequestRecord:
    return RequestRecord(
        index=index,
        at_s=at_s,
        sent_s=at_s,
        planned_tokens=1,
        output_tokens=1,
        outcome=outcome,
        first_token_s=at_s + ttft_s,
        last_token_s=at_s + ttft_s,
        finished_s=at_s + ttft_s,
        answer_digest=digest,
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill:decode@20", Fault(kind="kill", who=("decode",), at_s=20.0)),
        ("kill:prefill,decode@20/20", Fault(kind="kill", who=("prefill", "decode"), at_s=20.0, every_s=20.0)),
        ("freeze=1.5:decode-0@3", Fault(kind="freeze", who=("decode-0",), at_s=3.0, seconds=1.5)),
        ("rolling:decode@0.5", Fault(kind="rolling", who=("decode",), at_s=0.5)),
    ],
)
def test_fault_when_it_is_written_as_documented_is_read(text: str, fault: Fault) -> None:
    assert Fault.parse(text) == fault


@pytest.mark.parametrize(
    "text", ["", "kill", "kill:decode", "kill:decode@x", "stab:decode@3", "kill:decode@1/0", "kill:@3", "kill:decode@1.2.3"]
)
def test_fault_when_it_is_not_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadInput, match="--fault"):
        Fault.parse(text)


@pytest.mark.parametrize("address", ["10.1.2.3:50051", "worker.example:50051", ""])
def test_process_when_it_is_elsewhere_is_not_looked_for(address: str) -> None:
    with pytest.raises(BadInput, match="no process of this machine"):
        pid_of("decode-0", address)


def test_recovery_when_requests_fare_badly_for_four_seconds_takes_four() -> None:
    records = [record(i, i * 0.5, ttft_s=5.0 if 10.0 <= i * 0.5 < 14.0 else 0.1) for i in range(60)]
    assert recovered_s(records, OBJECTIVE, 10.0) == pytest.approx(4.0)


def test_recovery_when_half_of_the_requests_fare_badly_has_not_come_yet() -> None:
    records = [record(i, i * 0.5, ttft_s=5.0 if 10.0 <= i * 0.5 < 14.0 and i % 2 else 0.1) for i in range(60)]
    assert recovered_s(records, OBJECTIVE, 10.0) == pytest.approx(4.0)


def test_recovery_when_nothing_was_felt_takes_no_time_and_when_all_is_lost_is_none() -> None:
    records = [record(i, i * 0.5) for i in range(60)]
    assert recovered_s(records, OBJECTIVE, 10.0) == 0.0
    lost = [record(i, i * 0.5, outcome=Outcome.FAILED if i >= 20 else Outcome.COMPLETED) for i in range(60)]
    assert recovered_s(lost, OBJECTIVE, 10.0) is None


def test_wrong_answers_when_digests_differ_are_those_that_completed_in_both_runs() -> None:
    reference = [record(0, 0.0), record(1, 1.0), record(2, 2.0, outcome=Outcome.FAILED), record(3, 3.0)]
    faulty = [record(0, 0.0), record(1, 1.0, digest="x"), record(2, 2.0, digest="x"), record(3, 3.0, digest="x", outcome=Outcome.FAILED)]
    assert wrong_answers(faulty, reference) == [1]
    faulty[0].output_tokens = 2
    assert duplicated(faulty) == [0]


def status(state: str, epoch: int, *, owned: int = 0, in_flight: int = 0) -> status_pb2.WatchStatusResponse:
    worker = status_pb2.WorkerStatus(
        worker=common_pb2.WorkerId(worker_id="d0", epoch=epoch),
        role="decode",
        address="127.0.0.1:1",
        state=state,
        load=common_pb2.WorkerLoad(blocks_owned=owned),
    )
    return status_pb2.WatchStatusResponse(workers=[worker], in_flight=in_flight)


def test_watch_when_a_worker_changes_tells_when_and_who_is_up() -> None:
    watch = Watch("router")
    watch.take(status("up", 1, owned=3))
    assert watch.worker_ids("decode") == watch.worker_ids("d0") == ["d0"] and watch.held() == {"d0": 3}
    before_s = watch.histories["d0"][-1].at_s
    assert watch.unnoticed_since("d0", before_s + 1e-9) is None
    watch.take(status("silent", 1, owned=3))
    noticed_s = watch.unnoticed_since("d0", before_s + 1e-9)
    assert noticed_s is not None and noticed_s >= 0.0
    # Nobody can say what a worker that is not up still holds.
    assert watch.worker_ids("decode") == [] and watch.held() == {}
    watch.take(status_pb2.WatchStatusResponse())
    assert watch.histories["d0"][-1].state == "gone"
