"""The live view, drawn from a run whose state is known."""

import time

from rich.console import Console

from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.run.conductor import Tally
from loadtest.run.faults import Strike
from loadtest.run.live import LiveView, plain_line
from loadtest.run.watch import Watch
from loadtest.schedule import PlannedRequest, Schedule
from protos.baton.v1 import common_pb2, status_pb2

OBJECTIVE = Objective(ttft_s=1.0, tpot_s=0.1)


def record(index: int, at_s: float, outcome: Outcome = Outcome.COMPLETED) -> RequestRecord:
    return RequestRecord(
        index=index,
        at_s=at_s,
        sent_s=at_s + 0.002,
        planned_tokens=2,
        output_tokens=2,
        outcome=outcome,
        first_token_s=at_s + 0.1,
        last_token_s=at_s + 0.15,
        finished_s=at_s + 0.15,
        stages={"prefill": 0.09, "first_token_return": 0.01, "decode": 0.05},
    )


def drawn(view: LiveView) -> str:
    console = Console(width=120, record=True, force_terminal=False, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    with console.file:
        console.print(view)
    return console.export_text().replace("\N{NO-BREAK SPACE}", " ")


def test_view_when_a_run_goes_on_shows_rates_attainment_stages_workers_and_faults() -> None:
    requests = tuple(PlannedRequest(at_s=index * 0.5, input_tokens=8, output_tokens=2) for index in range(100))
    tally = Tally(start_s=time.monotonic() - 20.0, sent=[20, 19], open=[1, 2])
    tally.records = [record(index, index * 0.5) for index in range(36)] + [record(36, 18.0, Outcome.FAILED)]
    watch = Watch("router")
    load = common_pb2.WorkerLoad(num_running=3, num_waiting=4, blocks_total=100, blocks_owned=25, blocks_quarantined=5, blocks_cached=60)
    worker = status_pb2.WorkerStatus(worker=common_pb2.WorkerId(worker_id="decode-0", epoch=1), role="decode", state="up", load=load)
    watch.take(status_pb2.WatchStatusResponse(workers=[worker]))
    strikes = [Strike(at_s=12.3, struck_s=0.0, kind="kill", worker_id="decode-0")]
    text = drawn(LiveView(Schedule(block_size=8, requests=requests, source="s"), OBJECTIVE, tally, watch, strikes))
    # Two a second were due; of the last ten seconds those of 9.9 s to 17.5 s have been answered.
    assert "offered 2.0 requests/s" in text and "answered 1.6 /s" in text
    assert "attainment so far 97.3%" in text and "open 3" in text and "failed 1" in text
    assert "37 of 100 requests ended" in text
    assert "prefill 60%" in text and "first token return 7%" in text and "decode 33%" in text
    assert "30 of 100, 60 cached" in text
    assert "faults: 12 s kill decode-0" in text


def test_view_when_nothing_has_happened_yet_or_the_target_tells_nothing_is_drawn_all_the_same() -> None:
    tally = Tally(start_s=time.monotonic() + 0.3)
    text = drawn(LiveView(Schedule(block_size=8, requests=(), source="s"), OBJECTIVE, tally, None, []))
    assert "0 of 0 requests ended" in text and "the target tells none" in text
    assert "0 of 0 sent" in plain_line(tally, 0, OBJECTIVE)
