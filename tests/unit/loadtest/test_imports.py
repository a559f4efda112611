"""Result files of other tools: what is read from each, and what is refused."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtest.files import BadInput
from loadtest.records import Outcome
from loadtest.report.compare import compare
from loadtest.report.imports import load_any
from loadtest.report.page import render
from loadtest.report.run_page import run_page
from loadtest.result import save_result
from tests.unit.loadtest.made_results import made_records, made_result

START_NS = 1_790_000_000_000_000_000


def aiperf_row(**changes: Any) -> dict[str, Any]:
    """A request that waited 2 ms for its sender, 100 ms for its first token, and brought 5 of 8 tokens in 4 chunks."""
    return {
        "metadata": {
            "session_num": 0,
            "x_request_id": "r0",
            "x_correlation_id": "x0",
            "conversation_id": "c0",
            "turn_index": 0,
            "credit_issued_ns": START_NS,
            "request_start_ns": START_NS + 2_000_000,
            "request_end_ns": START_NS + 302_500_000,  # half a millisecond after the last token
            "worker_id": "worker_1",
            "record_processor_id": "record_processor_1",
            "benchmark_phase": "profiling",
            "was_cancelled": False,
        },
        "metrics": {
            "time_to_first_token": {"value": 100.0, "unit": "ms"},
            "request_latency": {"value": 300.0, "unit": "ms"},
            "inter_chunk_latency": {"value": [50.0, 50.0, 100.0], "unit": "ms"},
            "inter_token_latency": {"value": 50.0, "unit": "ms"},
            "input_sequence_length": {"value": 90, "unit": "tokens"},
            "usage_prompt_tokens": {"value": 96, "unit": "tokens"},
            "usage_prompt_cache_read_tokens": {"value": 64, "unit": "tokens"},
            "output_sequence_length": {"value": 5, "unit": "tokens"},
            "osl_mismatch_diff_pct": {"value": -37.5, "unit": "%"},
        },
        "error": None,
    } | changes


def metadata(after_ns: int, **changes: Any) -> dict[str, Any]:
    times = {"credit_issued_ns": START_NS, "request_start_ns": START_NS, "request_end_ns": START_NS + 5_000_000}
    found: dict[str, Any] = aiperf_row()["metadata"]
    return found | {name: time + after_ns for name, time in times.items()} | changes


def write_lines(path: Path, *rows: object) -> Path:
    path.write_bytes(b"\n".join(map(msgspec.json.encode, rows)) + b"\n")
    return path


def test_load_any_when_aiperf_wrote_it_keeps_its_figures_and_counts_from_the_credit(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "profile_export.jsonl",
        aiperf_row(metadata=metadata(1_000_000_000), metrics={}, error={"code": 503, "type": "HTTPError", "message": "busy"}),
        aiperf_row(metadata=metadata(-9_000_000_000, benchmark_phase="warmup")),
        aiperf_row(),
        aiperf_row(metadata=metadata(2_000_000_000, was_cancelled=True), metrics={}),
    )
    result, records = load_any(path)
    assert [record.index for record in records] == [0, 1, 2]
    first = records[0]
    assert (first.at_s, first.outcome, first.input_tokens, first.cached_tokens, first.output_tokens) == (0.0, Outcome.COMPLETED, 96, 64, 5)
    # Seconds since 1970 in floating point are good for a microsecond.
    assert (first.sent_s, first.ttft_s, first.tpot_s, first.e2e_s) == pytest.approx((0.002, 0.102, 0.05, 0.3025), abs=2e-6)
    assert (first.planned_tokens, first.session, first.request_id) == (8, "", "r0")
    assert first.gaps_s == pytest.approx([0.05, 0.05, 0.1])
    assert result.summary.ttft_as_sent_ms is not None and result.summary.ttft_as_sent_ms.p50 == pytest.approx(100.0, abs=2e-3)
    assert (records[1].outcome, records[1].error) == (Outcome.REFUSED, "HTTPError: busy")
    assert records[1].at_s == pytest.approx(1.0, abs=1e-6)
    assert records[2].outcome is Outcome.FAILED
    assert (result.kind, result.name, result.schedule.requests) == ("imported", "profile_export.jsonl (AIPerf)", 3)


def test_load_any_when_aiperf_had_conversations_keeps_the_turns_of_each_together(tmp_path: Path) -> None:
    turns = [("x0", 0), ("x1", 0), ("x0", 1), ("x2", 0)]
    rows = [
        aiperf_row(metadata=metadata(number * 1_000_000_000, x_correlation_id=name, turn_index=turn), metrics={})
        for number, (name, turn) in enumerate(turns)
    ]
    _, records = load_any(write_lines(tmp_path / "profile_export.jsonl", *rows))
    assert [record.session for record in records] == ["x0", "", "x0", ""]
    assert {record.planned_tokens for record in records} == {0}


def vllm_file(**changes: Any) -> dict[str, Any]:
    """Two requests of which the second failed; the first waited 0.5 s for --max-concurrency."""
    return {
        "date": "20260101-000000",
        "request_throughput": 1.0,
        "input_lens": [100, 50],
        "output_lens": [4, 0],
        "ttfts": [0.25, 0.0],
        "itls": [[0.1, 0.1, 0.2], []],
        "latencies": [0.66, 0.0],
        "start_times": [5000.5, 5001.0],
        "queue_times": [0.5, 0.0],
        "generated_texts": ["a b c d", ""],
        "errors": ["", "Traceback\nConnectionError: gone\n"],
    } | changes


def test_load_any_when_vllm_wrote_it_counts_from_before_the_wait_for_concurrency(tmp_path: Path) -> None:
    _, records = load_any(write_lines(tmp_path / "vllm.json", vllm_file()))
    first, second = records
    assert (first.at_s, first.sent_s, first.input_tokens, first.output_tokens) == (0.0, 0.5, 100, 4)
    assert (first.ttft_s, first.tpot_s, first.e2e_s) == pytest.approx((0.75, 0.4 / 3, 1.16))
    assert first.gaps_s == [0.1, 0.1, 0.2]
    assert (second.at_s, second.outcome, second.error, second.ttft_s) == (1.0, Outcome.FAILED, "ConnectionError: gone", None)


def test_load_any_when_an_older_vllm_wrote_it_ends_with_the_last_token(tmp_path: Path) -> None:
    old = {name: value for name, value in vllm_file().items() if name not in ("latencies", "queue_times")}
    _, records = load_any(write_lines(tmp_path / "vllm.json", old))
    assert records[0].at_s == 0.0
    assert records[0].e2e_s == pytest.approx(0.65)


def guidellm_request(**changes: Any) -> dict[str, Any]:
    timings = {
        "targeted_start": 1000.0,
        "resolve_start": 1000.009,
        "request_start": 1000.01,
        "first_token_iteration": 1000.2,
        "last_token_iteration": 1000.6,
        "request_end": 1000.61,
        "resolve_end": 1000.62,
    }
    return {
        "request_id": "g0",
        "info": {"status": "completed", "timings": timings | changes.pop("timings", {}), "error": changes.pop("error", None)},
        "prompt_tokens": 40,
        "output_tokens": 5,
        "cached_tokens": None,
    } | changes


def guidellm_file(*strategies: str) -> dict[str, Any]:
    failed = guidellm_request(error="timeout", timings={"targeted_start": 1001.0, "request_start": 1001.0, "first_token_iteration": None})
    failed["info"]["timings"] |= {"last_token_iteration": None, "request_end": 1003.0}
    unborn = guidellm_request(timings={"request_start": None, "resolve_start": None})
    requests = {"successful": [guidellm_request()], "errored": [failed], "incomplete": [unborn], "total": None}
    return {
        "metadata": {"version": 2, "guidellm_version": "0.8.1"},
        "config": {},
        "benchmarks": [{"config": {"strategy": {"type_": strategy}}, "requests": requests} for strategy in strategies],
    }


def test_load_any_when_guidellm_wrote_it_counts_from_the_target_of_strategies_that_have_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "benchmarks.json", guidellm_file("poisson", "throughput"))
    _, records = load_any(tmp_path / "benchmarks.json#1")
    assert [record.outcome for record in records] == [Outcome.COMPLETED, Outcome.FAILED]
    assert (records[0].sent_s, records[0].ttft_s, records[0].tpot_s, records[0].e2e_s) == pytest.approx((0.01, 0.2, 0.1, 0.61))
    assert records[1].error == "timeout"
    assert records[1].at_s == pytest.approx(1.0)
    _, records = load_any(tmp_path / "benchmarks.json#2")
    assert records[0].lag_s == 0.0
    assert records[0].ttft_s == pytest.approx(0.19)
    with pytest.raises(BadInput, match=r"has 2 benchmarks: name one, as benchmarks.json#1"):
        load_any(path)
    with pytest.raises(BadInput, match="it has benchmarks 1 to 2"):
        load_any(tmp_path / "benchmarks.json#3")


def test_load_any_when_the_result_is_ours_reads_it(tmp_path: Path) -> None:
    records = made_records(requests=20)
    save_result(made_result(records), records, tmp_path / "ours.json")
    assert load_any(tmp_path / "ours.json")[1] == records
    with pytest.raises(BadInput, match="only a GuideLLM report has several benchmarks"):
        load_any(write_lines(tmp_path / "vllm.json", vllm_file()).with_name("vllm.json#1"))


def test_compare_when_one_result_is_imported_works_and_warns(tmp_path: Path) -> None:
    records = made_records(requests=60)
    ours = (made_result(records), records)
    theirs = load_any(write_lines(tmp_path / "profile_export.jsonl", *(aiperf_row() for _ in range(30))))
    assert "one schedule is not known" in compare(ours, theirs).warnings[0]
    assert "imported from another tool" in render(run_page(*theirs))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("x.json", {"hello": 1}, r"x.json is no result of `loadtest`, AIPerf"),
        ("x.json", {"format": "other/1"}, r"has format 'other/1'"),
        ("x.json", [1], r"x.json: Expected `object`, got `array`"),
        ("x.jsonl", aiperf_row(metadata={}), r"line 1: Object missing required field `request_start_ns` - at `\$.metadata`"),
        ("x.jsonl", aiperf_row(metrics={"request_latency": {"value": -1, "unit": "ms"}}), "request 1: metrics.request_latency is -1"),
        (
            "x.jsonl",
            aiperf_row(metrics={"request_latency": {"value": 1, "unit": "min"}}),
            "metrics.request_latency has unit 'min', not one of",
        ),
        ("x.jsonl", aiperf_row(metadata=metadata(0, benchmark_phase="warmup")), "x.jsonl: it has no requests"),
        ("x.jsonl", aiperf_row(metrics={"time_to_first_token": {"value": 900, "unit": "ms"}}), "do not follow one another"),
        ("x.json", {"request_throughput": 2.0}, "run with --save-result --save-detailed"),
        ("x.json", vllm_file(itls=[]), "itls has 0 values, ttfts has 2"),
        ("x.json", vllm_file(ttfts=["soon"]), r"Expected `float`, got `str` - at `\$.ttfts"),
        ("x.json", {"benchmarks": [{}]}, r"Object missing required field `requests` - at `\$.benchmarks"),
    ],
)
def test_load_any_when_a_file_cannot_be_used_says_where_and_why(tmp_path: Path, name: str, row: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_any(write_lines(tmp_path / name, row))


def test_load_any_when_there_is_no_file_or_no_text_names_it(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none.json: No such file"):
        load_any(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match=r"binary.json cannot be read"):
        load_any(tmp_path / "binary.json")
