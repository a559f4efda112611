"""From options to a schedule: what is found out, what is refused, in which order things are done."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtest.files import BadInput
from loadtest.schedule import PlannedRequest, Schedule
from loadtest.traces.arrivals import Arrivals, arrival_times
from loadtest.workload_options import Format, WorkloadOptions, detect, load_workload

MOONCAKE = {"timestamp": 3000, "input_length": 600, "output_length": 20, "hash_ids": [1, 2]}
WEKA = {
    "id": "a",
    "block_size": 4,
    "tool_tokens": 4,
    "system_tokens": 4,
    "requests": [{"t": t, "in": 9, "out": 3, "hash_runs": [1, 2], "think_time": 1} for t in (0, 1)],
}
CONTENTS = {
    Format.MOONCAKE: "".join(json.dumps({**MOONCAKE, "timestamp": 1000 * i, "hash_ids": [1, i + 2]}) + "\n" for i in range(5)),
    Format.WEKA: "".join(json.dumps({**WEKA, "id": name}) + "\n" for name in "ab"),
    Format.AZURE: "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46,374,44\r\n2023-11-16 18:15:47,20,4\r\n",
    Format.SERVEGEN: "timestamp_s,tenant,input_length,output_length\n0.001,143,666,5\n2,1,9,5\n",
    Format.TEXT: '\n{"turns": ["Why?", "Really?"]}\n{"prompt": "How?"}\n{"text": "When?"}\n',
}


@pytest.fixture
def files(tmp_path: Path) -> Callable[[Format], str]:
    """The path of a file of each format, or the generator's name."""

    def path_of(source_format: Format) -> str:
        if source_format is Format.GENERATED:
            return "generated"
        path = tmp_path / "trace"
        if source_format is Format.SCHEDULE:
            request = PlannedRequest(at_s=0.0, input_tokens=5, output_tokens=2, block_runs=((0, 2),))
            Schedule(block_size=4, requests=(request,), source="here").save(path)
        else:
            path.write_text(CONTENTS[source_format])
        return str(path)

    return path_of


@pytest.mark.parametrize("source_format", sorted(set(Format) - {Format.GENERATED}))
def test_detect_finds_out_every_format(files: Callable[[Format], str], source_format: Format) -> None:
    assert detect(Path(files(source_format))) is source_format


@pytest.mark.parametrize("contents", ["", "hello\n", "[1]\n", '{"a": 1}\n', "a,b\n1,2\n"])
def test_detect_when_it_is_none_of_them_says_so(tmp_path: Path, contents: str) -> None:
    (tmp_path / "trace").write_text(contents)
    with pytest.raises(BadInput, match=r"trace, line 1: .*none of the formats"):
        load_workload(WorkloadOptions(source=str(tmp_path / "trace")))


@pytest.mark.parametrize("source_format", list(Format))
def test_load_workload_when_repeated_in_another_process_gives_the_same_digest(
    files: Callable[[Format], str], source_format: Format
) -> None:
    options = WorkloadOptions(source=files(source_format), seed=3, requests=200)
    code = (
        "import sys; from loadtest.prompts import token_ids; from loadtest.workload_options import *\n"
        "schedule = load_workload(WorkloadOptions(source=sys.argv[1], seed=3, requests=200))\n"
        "print(schedule.digest)\n"
        "blocks = [request for request in schedule.requests if not request.text]\n"
        "print([token_ids(r, block_size=schedule.block_size, seed=3, vocab_size=999)[-5:].tolist() for r in blocks])"
    )
    results = [
        subprocess.run(
            [sys.executable, "-c", code, options.source],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert results[0] == results[1]
    assert results[0].splitlines()[0] == load_workload(options).digest


@pytest.mark.parametrize("source_format", [Format.MOONCAKE, Format.WEKA, Format.TEXT, Format.GENERATED])
def test_load_workload_when_the_seed_differs_draws_something_else(files: Callable[[Format], str], source_format: Format) -> None:
    rate = 2.0 if source_format is Format.MOONCAKE else None
    digests = {load_workload(WorkloadOptions(source=files(source_format), rate=rate, requests=4, seed=seed)).digest for seed in (1, 2)}
    assert len(digests) == 2


def test_load_workload_does_things_in_the_order_it_says(files: Callable[[Format], str]) -> None:
    schedule = load_workload(
        WorkloadOptions(source=files(Format.MOONCAKE), scale=32, max_model_len=20, speedup=2.0, repeat=2, seconds=1.6, requests=7)
    )
    # 600 tokens are 512 + 88: 16 + 3 when divided by 32, and one of 20 answered.
    assert {(request.input_tokens, request.output_tokens) for request in schedule.requests} == {(19, 1)}
    assert schedule.block_size == 16
    assert [request.at_s for request in schedule.requests] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.5]


def test_load_workload_when_arrivals_are_asked_for_replaces_the_recorded_ones(files: Callable[[Format], str]) -> None:
    source = files(Format.MOONCAKE)
    poisson = load_workload(WorkloadOptions(source=source, rate=20.0, seed=9))
    assert [request.at_s for request in poisson.requests] == arrival_times(5, rate=20.0, seed=9)
    bursts = load_workload(WorkloadOptions(source=source, burstiness=0.3))
    assert [request.at_s for request in bursts.requests] == arrival_times(5, rate=1.0, burstiness=0.3, seed=0)
    faster = load_workload(WorkloadOptions(source=source, rate=4.0, arrivals=Arrivals.TRACE))
    assert [request.at_s for request in faster.requests] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_load_workload_when_nothing_is_left_says_so(files: Callable[[Format], str]) -> None:
    with pytest.raises(BadInput, match=r"no request is left.*at most 600 tokens: 5 requests left out"):
        load_workload(WorkloadOptions(source=files(Format.MOONCAKE), max_model_len=600))


def test_load_workload_when_generated_for_a_time_fills_it() -> None:
    for burstiness in (None, 0.05):
        options = WorkloadOptions(source="generated", seconds=30.0, rate=20.0, burstiness=burstiness, speedup=2.0)
        schedule = load_workload(options)
        assert 28.0 < schedule.requests[-1].at_s < 30.0
        if burstiness is None:
            assert len(schedule) == pytest.approx(20.0 * 2.0 * 30.0, rel=0.1)  # three standard deviations
        assert "requests left out" in schedule.source
    # Two bounds: the one that comes first.
    assert len(load_workload(WorkloadOptions(source="generated", seconds=30.0, requests=10))) == 10
    assert len(load_workload(WorkloadOptions(source="generated", seconds=1.0, requests=1000))) < 50


def test_load_workload_gives_each_reader_its_options(files: Callable[[Format], str]) -> None:
    spread = load_workload(WorkloadOptions(source=files(Format.MOONCAKE), spread=3.0))
    assert all(request.at_s % 1 for request in spread.requests)
    weka = load_workload(WorkloadOptions(source=files(Format.WEKA), session_rate=1e-3))
    assert weka.requests[-1].after is not None and max(weka.earliest_s) > 60
    text = load_workload(WorkloadOptions(source=files(Format.TEXT), think=4.0, output_tokens=9, rate=1e3))
    assert (text.requests[1].think_s, text.requests[1].output_tokens) == (4.0, 9)
    assert max(text.requests[2].at_s, text.requests[3].at_s) < 1
    azure = load_workload(WorkloadOptions(source=files(Format.AZURE), block_size=10))
    assert len(azure.requests[0].block_ids()) == 38
    generated = load_workload(WorkloadOptions(source="generated", requests=300, tenants=2, sessions=True, think=0.5))
    assert {request.tenant for request in generated.requests} == {"tenant-0", "tenant-1"}
    assert any(request.after is not None for request in generated.requests)


@pytest.mark.parametrize(
    ("source_format", "given", "message"),
    [
        (Format.AZURE, {"spread": 3.0}, "--spread is for mooncake"),
        (Format.MOONCAKE, {"session_rate": 3.0}, "--session-rate is for weka"),
        (Format.WEKA, {"block_size": 16}, "--block-size is for"),
        (Format.TEXT, {"sessions": True}, "--sessions is for generated"),
        (Format.AZURE, {"think": 1.0}, "--think is for generated, text"),
        (Format.AZURE, {"burstiness": 2.0, "arrivals": Arrivals.POISSON}, "--burstiness"),
        (Format.AZURE, {"arrivals": Arrivals.GAMMA}, "--burstiness"),
        (Format.GENERATED, {"arrivals": Arrivals.TRACE}, "no arrivals are recorded in generated"),
        (Format.AZURE, {"rate": float("nan")}, "--rate must be a finite number"),
    ],
)
def test_load_workload_when_options_do_not_belong_together_names_them(
    files: Callable[[Format], str], source_format: Format, given: dict[str, object], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        load_workload(WorkloadOptions(source=files(source_format), **given))  # type: ignore[arg-type]
