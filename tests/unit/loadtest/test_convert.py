"""The command, as a user runs it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from loadtest.app import app
from loadtest.schedule import Schedule
from loadtest.traces import mooncake
from loadtest.workload_options import WorkloadOptions, load_workload


def _convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def _trace(folder: Path) -> Path:
    path = folder / "trace.jsonl"
    rows = [{"timestamp": 1000 * i, "input_length": 1100, "output_length": 20 + i, "hash_ids": [0, 1 + i // 2, 9 + i]} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_convert_prints_what_is_in_the_schedule_that_it_writes(tmp_path: Path) -> None:
    result = _convert(_trace(tmp_path), tmp_path / "out.jsonl.gz", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    schedule = Schedule.load(tmp_path / "out.jsonl.gz")
    assert len(schedule) == printed["num_requests"] == 4
    assert printed["digest"] == schedule.digest
    assert (printed["span_s"], printed["rate"], printed["gap_cv"]) == (3.0, 1.0, 0.0)
    assert (printed["input_tokens"]["mean"], printed["output_tokens"]["p50"]) == (1100.0, 21.5)
    assert (printed["num_sessions"], printed["num_tenants"]) == (0, 0)
    # Of the second and fourth both full blocks, of the third the common one.
    assert printed["infinite_cache_reuse"] == pytest.approx((2 + 1 + 2) * 512 / 4400)


def test_convert_prints_a_table_with_all_of_it(tmp_path: Path) -> None:
    result = _convert("generated", tmp_path / "out.jsonl", "--requests", "50", "--tenants", "3", "--sessions", "--think", "1")
    assert result.exit_code == 0, result.output
    for label in ("requests", "span", "rate", "input tokens, mean / p50 / p90 / p99", "sessions", "tenants", "reusable input", "digest"):
        assert f" {label}" in result.stdout
    assert "│ 3 " in result.stdout
    assert Schedule.load(tmp_path / "out.jsonl").digest[:30] in result.stdout


def test_convert_counts_sessions_and_their_later_turns_at_their_earliest(tmp_path: Path) -> None:
    turns = [{"t": 10 * t, "in": 5, "out": 3, "hash_runs": [1, 1], "think_time": 10 * t} for t in range(2)]
    session = {"id": "a", "block_size": 4, "tool_tokens": 4, "system_tokens": 0, "requests": turns}
    (tmp_path / "in.jsonl").write_text(json.dumps(session) + "\n")
    printed = json.loads(_convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--json").stdout)
    assert (printed["num_sessions"], printed["span_s"], printed["rate"]) == (1, 10.0, 0.1)


def test_convert_when_prompts_are_texts_does_not_say_what_they_share(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "Why?"}\n')
    result = _convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert "not known of texts" in result.stdout
    assert "rate" not in result.stdout  # one request has none


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([16, 512]))
def test_convert_to_mooncake_and_back_is_the_same_workload(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sessions: bool, block_size: int
) -> None:
    folder = tmp_path_factory.mktemp("convert")
    options = ["--requests", 20, "--rate", 40, "--think", 0.1, "--block-size", block_size, "--seed", seed, *["--sessions"] * sessions]
    result = _convert("generated", folder / "out.jsonl", "--to", "mooncake", *options)
    assert result.exit_code == 0, result.output
    original = load_workload(
        WorkloadOptions(source="generated", requests=20, rate=40.0, think=0.1, block_size=block_size, seed=seed, sessions=sessions or None)
    )
    again = mooncake.read(folder / "out.jsonl", block_size=block_size)
    assert [request.block_ids() for request in again.requests] == [request.block_ids() for request in original.requests]
    assert [request.input_tokens for request in again.requests] == [request.input_tokens for request in original.requests]
    assert [request.output_tokens for request in again.requests] == [request.output_tokens for request in original.requests]
    assert [request.at_s for request in again.requests] == pytest.approx(original.earliest_s, abs=1e-6)


def test_convert_when_something_is_wrong_says_it_in_a_line_and_exits_2(tmp_path: Path) -> None:
    trace = _trace(tmp_path)
    for arguments, message in [
        ((tmp_path / "missing", tmp_path / "out"), "missing: No such file"),
        ((trace, trace), "trace.jsonl is the source itself"),
        ((trace, tmp_path / "nowhere" / "out"), "out: No such file"),
        ((trace, tmp_path / "out", "--scale", 3), "cannot be divided by 3"),
        ((trace, tmp_path / "out", "--tenants", 3), "--tenants is for generated"),
    ]:
        result = _convert(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ") and message in result.stderr, result.stderr
        assert not (tmp_path / "out").exists()
