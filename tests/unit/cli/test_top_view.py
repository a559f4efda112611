"""`baton top` as a pure function of two samples: rates are differences, and what is not known is not made up."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from protos.baton.v1 import common_pb2, status_pb2
from services.cli.top_view import occupancy, rates, view, worker_rates

ROUTER = "127.0.0.1:50051"


def load(**changes: int) -> common_pb2.WorkerLoad:
    message = common_pb2.WorkerLoad(blocks_total=400, blocks_free=200, blocks_cached=140, blocks_owned=50, blocks_quarantined=10)
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def worker(
    name: str, state: str = "up", *, epoch: int = 1, age_s: float = 0.0, load: common_pb2.WorkerLoad | None = None
) -> status_pb2.WorkerStatus:
    return status_pb2.WorkerStatus(
        worker=common_pb2.WorkerId(worker_id=name, epoch=epoch), role=name.rpartition("-")[0], state=state, report_age_s=age_s, load=load
    )


def sample(uptime_s: float, *workers: status_pb2.WorkerStatus, **changes: object) -> status_pb2.WatchStatusResponse:
    message = status_pb2.WatchStatusResponse(router_id="router-0", model_name="demo", uptime_s=uptime_s, workers=workers)
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def shown(
    before: status_pb2.WatchStatusResponse | None, now: status_pb2.WatchStatusResponse, *, width: int = 80, trouble: str = ""
) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(view(before, now, router=ROUTER, trouble=trouble))
    return file.getvalue().splitlines()


def test_rates_when_two_samples_are_of_one_router_are_differences_over_its_own_time() -> None:
    before = sample(10.0, accepted=100, prompt_tokens=1000, cached_tokens=400, output_tokens=500, kv_bytes=10_000_000)
    now = sample(12.0, accepted=104, prompt_tokens=1800, cached_tokens=600, output_tokens=900, kv_bytes=13_000_000)
    rate = rates(before, now)
    assert (rate.requests, rate.prompt_tokens, rate.output_tokens, rate.kv_bytes, rate.hit_rate) == (2.0, 400.0, 200.0, 1_500_000.0, 0.25)


@pytest.mark.parametrize(
    "before",
    [None, sample(50.0, accepted=100), sample(2.0, accepted=100, router_id="router-1")],
    ids=["first sample", "restarted", "another router"],
)
def test_rates_when_samples_cannot_be_compared_are_unknown(before: status_pb2.WatchStatusResponse | None) -> None:
    rate = rates(before, sample(5.0, accepted=3))
    assert rate.requests is rate.prompt_tokens is rate.output_tokens is rate.kv_bytes is rate.hit_rate is None


def test_rates_when_no_prompt_came_have_no_hit_rate() -> None:
    rate = rates(sample(1.0, prompt_tokens=5), sample(2.0, prompt_tokens=5))
    assert rate.hit_rate is None and rate.prompt_tokens == 0.0


def test_worker_rates_when_reported_twice_are_over_the_time_between_the_reports() -> None:
    earlier = worker("decode-0", age_s=0.5, load=load(engine_steps=10, decode_tokens=100, prefill_tokens=40))
    later = worker("decode-0", age_s=0.1, load=load(engine_steps=24, decode_tokens=380, prefill_tokens=40))
    rate = worker_rates(sample(10.0, earlier), sample(11.0, later), later)  # 9.5 s to 10.9 s
    assert rate.steps == pytest.approx(10.0) and rate.tokens == pytest.approx(200.0) and rate.batch == 20.0


def test_worker_rates_when_it_prefills_count_prompt_tokens_alone() -> None:
    earlier = worker("prefill-0", load=load(engine_steps=10, prefill_tokens=1000, decode_tokens=10))
    later = worker("prefill-0", load=load(engine_steps=12, prefill_tokens=2000, decode_tokens=15))
    rate = worker_rates(sample(1.0, earlier), sample(2.0, later), later)
    assert rate.tokens == 1000.0 and rate.batch == 500.0


def test_worker_rates_when_it_is_idle_have_no_batch() -> None:
    idle = worker("decode-0", load=load(engine_steps=10, decode_tokens=100))
    rate = worker_rates(sample(1.0, idle), sample(2.0, idle), idle)
    assert (rate.tokens, rate.steps, rate.batch) == (0.0, 0.0, None)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (worker("decode-0", epoch=1, load=load(engine_steps=9)), worker("decode-0", epoch=2, load=load(engine_steps=10))),
        (worker("decode-1", load=load()), worker("decode-0", load=load())),
        (worker("decode-0"), worker("decode-0", load=load())),
        (worker("decode-0", load=load()), worker("decode-0", "connecting")),
        (worker("decode-0", load=load(engine_steps=9)), worker("decode-0", load=load(engine_steps=3))),
        (worker("decode-0", age_s=0.2, load=load()), worker("decode-0", "silent", age_s=1.2, load=load())),
    ],
    ids=["started again", "was not there", "had not reported", "is gone", "counters fell", "no new report"],
)
def test_worker_rates_when_reports_cannot_be_compared_are_unknown(earlier: status_pb2.WorkerStatus, later: status_pb2.WorkerStatus) -> None:
    rate = worker_rates(sample(1.0, earlier), sample(2.0, later), later)
    assert rate.tokens is rate.steps is rate.batch is None


def test_view_when_drawn_shows_all_facts_within_eighty_columns() -> None:
    summary = status_pb2.Summary(count=30, p50_s=0.04, p90_s=0.11, p99_s=0.4)
    before = sample(3600.0, worker("decode-0", load=load(engine_steps=10, decode_tokens=100)), prompt_tokens=1000, cached_tokens=500)
    now = sample(
        3661.0,
        worker("decode-0", age_s=0.02, load=load(engine_steps=620, decode_tokens=6200, num_running=3, num_waiting=2)),
        worker("prefill-0", "connecting"),
        in_flight=5,
        accepted=1234,
        finished=1220,
        failed=1,
        cancelled=6,
        shed=2,
        prompt_tokens=7100,
        cached_tokens=5075,
        output_tokens=6100,
        kv_bytes=122_000_000,
        index_synchronized=True,
        index_entries=4321,
    )
    now.ttft.CopyFrom(summary)
    lines = shown(before, now)
    assert max(map(len, lines)) <= 80
    assert lines[0].rstrip() == "router-0 at 127.0.0.1:50051 · demo · up 1:01:01 · index: 4,321 entries"
    assert lines[1].rstrip() == "in flight 5 · accepted 1,234 · finished 1,220 · failed 1 · cancelled 6 · shed 2"
    facts = "\n".join(lines)
    for fact in (
        "out 100 tokens/s",
        "prompts 100 tokens/s",
        "requests 20.2/s",
        "hits 75% (since start 71%)",
        "KV flow 2.0 MB/s",
        "122 MB",
    ):
        assert fact in facts
    assert [" ".join(line.split()) for line in lines if line.startswith(("TTFT", "TPOT"))] == [
        "TTFT p50 40.0 ms p90 110.0 ms p99 400.0 ms 30 in the last minute",
        "TPOT p50 – p90 – p99 – 0 in the last minute",
    ]
    [decode] = [line for line in lines if line.startswith("decode-0")]
    assert decode.split() == ["decode-0", "up", "3/2", "10.0", "██▒▒▒▒░░░░░░", "15%", "100", "10.0", "0.0", "s"]
    [prefill] = [line for line in lines if line.startswith("prefill-0")]
    assert prefill.split() == ["prefill-0", "connecting", *"––––––"]


def test_view_when_the_router_is_away_keeps_the_last_picture_and_says_why() -> None:
    lines = shown(None, sample(1.0), trouble="127.0.0.1:50051: the router has stopped; trying again")
    assert lines[-1] == "127.0.0.1:50051: the router has stopped; trying again"
    assert "index: not synchronized" in lines[0]
    assert any(line.startswith("none") for line in lines)


def test_view_when_a_worker_is_not_named_after_its_role_tells_the_role() -> None:
    status = worker("decode-0", load=load())
    status.worker.worker_id = "10.0.0.7:9000"
    assert any(line.startswith("10.0.0.7:9000 (decode) ") for line in shown(None, sample(1.0, status), width=120))


def test_occupancy_when_a_pool_is_empty_or_full_has_one_kind_of_block() -> None:
    empty = load(blocks_free=400, blocks_cached=0, blocks_owned=0, blocks_quarantined=0)
    full = load(blocks_free=0, blocks_cached=0, blocks_owned=400, blocks_quarantined=0)
    assert occupancy(empty).plain == "░" * 12 + "   0%"
    assert occupancy(full).plain == "█" * 12 + " 100%"
    assert occupancy(common_pb2.WorkerLoad()).plain == "–"


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_occupancy_when_anything_is_there_shows_it_in_a_bar_of_one_length(owned: int, cached: int, free: int) -> None:
    pool = load(blocks_total=owned + cached + free, blocks_owned=owned, blocks_cached=cached, blocks_free=free, blocks_quarantined=0)
    drawn = occupancy(pool).plain
    if not pool.blocks_total:
        assert drawn == "–"
        return
    columns = [drawn.count(character) for character in "█▒░"]
    assert sum(columns) == 12
    for amount, count in zip((owned, cached, free), columns, strict=True):
        assert (count > 0) == (amount > 0)
        assert abs(count - 12 * amount / pool.blocks_total) <= 2
