"""Result files: what is written is what is read, and what is not ours is refused with its place."""

import gzip
from pathlib import Path

import pytest

from loadtest.ceilings import Ceilings
from loadtest.files import BadInput
from loadtest.records import Objective, Outcome, RequestRecord, load_records
from loadtest.result import (
    Cluster,
    FaultMark,
    Result,
    ScheduleFacts,
    load_result,
    now,
    save_result,
    this_commit,
    this_machine,
    this_version,
)
from loadtest.summary import summarize
from loadtest.verdict import verdict

RECORDS = [
    RequestRecord(
        index=0,
        at_s=0.0,
        sent_s=0.001,
        tenant="a",
        input_tokens=9,
        output_tokens=3,
        outcome=Outcome.COMPLETED,
        first_token_s=0.1,
        last_token_s=0.3,
        finished_s=0.3,
        gaps_s=[0.1, 0.1],
        cached_tokens=0,
        stages={"prefill": 0.1, "decode": 0.2},
    ),
    RequestRecord(index=1, at_s=0.5),
]


def result() -> Result:
    objective = Objective()
    return Result(
        kind="run",
        name="two requests",
        created=now(),
        command=("loadtest", "run"),
        baton=this_version(),
        commit=this_commit(),
        machine=this_machine(),
        schedule=ScheduleFacts(source="made", digest="d1", seed=1, requests=2, duration_s=0.5, block_size=16),
        cluster=Cluster(target="localhost:1", decode_workers=1),
        objective=objective,
        verdict=verdict(RECORDS, objective),
        summary=summarize(RECORDS, objective=objective, duration_s=0.5, num_workers=1),
        ceilings=Ceilings(infinite=0.5, one_pool=0.4, round_robin=0.1),
        faults=(FaultMark(at_s=0.2, kind="kill", worker_id="decode-0"),),
        extra={"probes": [{"rate": 1.0, "attainment": 0.5, "low": 0.1, "high": 0.9, "n": 2}]},
    )


def test_load_result_when_saved_before_is_the_same_with_its_records(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save_result(result(), RECORDS, path)
    loaded, records = load_result(path)
    assert loaded.records == "run.requests.jsonl.gz"
    assert loaded.summary == result().summary
    assert (loaded.ceilings, loaded.faults, loaded.extra, loaded.verdict) == (
        result().ceilings,
        result().faults,
        result().extra,
        result().verdict,
    )
    assert records == RECORDS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.json: Input data was truncated"),
        ("[]", "run.json: Expected `object`, got `array`"),
        ('{"format": "baton.loadtest/0"}', "run.json has format 'baton.loadtest/0', not baton.loadtest/1"),
        ('{"format": "baton.loadtest/1", "kind": 3}', r"run.json: Expected `str`, got `int` - at `\$.kind`"),
        ('{"format": "baton.loadtest/1", "kind": "run"}', "run.json: Object missing required field `name`"),
    ],
)
def test_load_result_when_the_file_is_not_one_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        load_result(path)


def test_load_result_when_the_file_or_its_records_are_missing_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"run.json: No such file"):
        load_result(tmp_path / "run.json")
    save_result(result(), RECORDS, tmp_path / "run.json")
    (tmp_path / "run.requests.jsonl.gz").unlink()
    with pytest.raises(BadInput, match=r"run.requests.jsonl.gz: No such file"):
        load_result(tmp_path / "run.json")


def test_load_records_when_a_row_is_bad_names_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"index": 0, "at_s": 0}\n{"index": 1, "at_s": "soon"}\n')
    with pytest.raises(BadInput, match=r"requests.jsonl, line 2: Expected `float`, got `str` - at `\$.at_s`"):
        load_records(path)
    path.write_text('{"index": 0, "at_s": 0, "input_tokens": -1}\n')
    with pytest.raises(BadInput, match="request 1: input_tokens is -1; it must be at least 0"):
        load_records(path)


def test_load_records_when_the_file_was_cut_off_says_so(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl.gz"
    whole = gzip.compress(b'{"index": 0, "at_s": 0}\n' * 100)
    for data in (whole[:-9], b"no gzip at all", gzip.compress(b"\xff\xfe")):
        path.write_bytes(data)
        with pytest.raises(BadInput, match=r"requests.jsonl.gz"):
            load_records(path)
