import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.ceilings import usable_blocks
from loadtest.files import BadInput
from loadtest.schedule import PlannedRequest, Schedule
from loadtest.traces import mooncake


def _request(at_s: float = 0.0, *, runs: tuple[tuple[int, int], ...] = ((0, 2),), **fields: object) -> PlannedRequest:
    return PlannedRequest(at_s=at_s, input_tokens=40, output_tokens=8, block_runs=runs, **fields)  # type: ignore[arg-type]


def _schedule(*requests: PlannedRequest) -> Schedule:
    return Schedule(block_size=32, requests=requests, source="here")


HEADER = '{"format": "baton.schedule/1", "block_size": 4, "source": "", "seed": 0, "digest": ""}\n'
REQUEST = '{"at_s": 0, "input_tokens": 4, "output_tokens": 1, "block_runs": [[0, 1]]}\n'
SESSION = _schedule(_request(), _request(after=0, think_s=3.0, session="s"), _request(2.0, runs=((7, 1), (3, 1))))


@pytest.mark.parametrize("name", ["schedule.jsonl", "schedule.jsonl.gz"])
def test_schedule_when_saved_and_loaded_is_the_same(tmp_path: Path, name: str) -> None:
    text = PlannedRequest(at_s=3.0, input_tokens=99, output_tokens=1, tenant="somebody", text="Größe?\nYes.")
    schedule = _schedule(*SESSION.requests, text)
    schedule.save(tmp_path / name)
    loaded = Schedule.load(tmp_path / name)
    assert loaded.requests == schedule.requests
    assert (loaded.block_size, loaded.digest) == (32, schedule.digest)


def test_schedule_when_anything_sent_differs_has_another_digest() -> None:
    others = [
        SESSION.with_speedup(2.0),
        SESSION.shrunk(2),
        SESSION.first(num_requests=2),
        _schedule(*SESSION.requests[:2], _request(2.0, runs=((7, 1), (4, 1)))),
    ]
    assert len({SESSION.digest, *(other.digest for other in others)}) == 5
    assert Schedule(block_size=32, requests=SESSION.requests, source="elsewhere").digest == SESSION.digest


def test_load_when_a_request_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schedule.jsonl"
    SESSION.save(path)
    path.write_text(path.read_text().replace('"output_tokens":8', '"output_tokens":9', 1))
    with pytest.raises(BadInput, match="digest"):
        Schedule.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no schedule"),
        ('{"format": "other/1", "block_size": 1, "source": "", "seed": 0, "digest": ""}\n', "no schedule"),
        ("no json\n", "line 1"),
        (f'{HEADER}{{"at_s": "x"}}\n', "line 2.*at_s"),
        (f'{HEADER}{{"at_s": -1, "input_tokens": 1, "output_tokens": 1}}\n', r"line 2.*>= 0.*at_s"),
        (f'{HEADER}\n{{"at_s": 0, "input_tokens": 0, "output_tokens": 1}}\n', r"line 3.*>= 1.*input_tokens"),
        (
            f'{HEADER}{{"at_s": 0, "input_tokens": 5, "output_tokens": 1, "block_runs": [[0, 3]]}}\n',
            "line 2: block_runs has 3 blocks, 2 of 4",
        ),
        (f'{HEADER}{{"at_s": 0, "input_tokens": 4, "output_tokens": 1, "block_runs": [[0, 1]], "after": 0}}\n', "line 2: after is 0"),
    ],
)
def test_load_when_the_file_is_none_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "schedule.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        Schedule.load(path)


def test_load_when_the_file_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        Schedule.load(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    with pytest.raises(BadInput, match=r"latin.jsonl: no text in UTF-8"):
        Schedule.load(tmp_path / "latin.jsonl")
    (tmp_path / "plain.jsonl.gz").write_text("{}\n")
    with pytest.raises(BadInput, match=r"plain.jsonl.gz: Not a gzipped file"):
        Schedule.load(tmp_path / "plain.jsonl.gz")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(f"{HEADER}{REQUEST * 99}".encode())[:-9])
    with pytest.raises(BadInput, match=r"cut.jsonl.gz: Compressed file ended"):
        Schedule.load(tmp_path / "cut.jsonl.gz")


def test_with_speedup_divides_times_and_thinking() -> None:
    faster = SESSION.with_speedup(4.0)
    assert [request.at_s for request in faster.requests] == [0.0, 0.0, 0.5]
    assert faster.requests[1].think_s == 0.75


def test_fitting_drops_all_turns_behind_one_that_is_too_long() -> None:
    long = PlannedRequest(at_s=0.0, input_tokens=100, output_tokens=8, block_runs=((0, 4),), after=0)
    schedule = _schedule(_request(), long, _request(after=1), _request(1.0))
    fitting = schedule.fitting(60)
    assert [request.at_s for request in fitting.requests] == [0.0, 1.0]
    assert "2 requests left out" in fitting.source


def test_first_keeps_links_between_turns_right() -> None:
    schedule = _schedule(_request(5.0), _request(1.0), _request(after=1), _request(after=0))
    early = schedule.first(seconds=2.0)
    assert [(request.at_s, request.after) for request in early.requests] == [(1.0, None), (0.0, 0)]


def test_first_counts_later_turns_at_the_earliest_time_at_which_they_can_come() -> None:
    schedule = _schedule(_request(1.0), _request(after=0, think_s=2.0), _request(after=1, think_s=2.0), _request(8.0))
    assert schedule.earliest_s == [1.0, 3.0, 5.0, 8.0]
    assert len(schedule.first(seconds=5.0)) == 2
    assert len(schedule.first(seconds=5.1)) == 3
    assert len(schedule.first(seconds=9.0, num_requests=1)) == 1
    assert schedule.first() is schedule


def test_with_times_moves_only_requests_that_have_their_own() -> None:
    moved = SESSION.with_times([1.0, 7.0], "other times")
    assert [(request.at_s, request.think_s) for request in moved.requests] == [(1.0, 0.0), (0.0, 3.0), (7.0, 0.0)]
    assert moved.source == "here; other times"


def test_repeated_copies_share_nothing_and_follow_their_own() -> None:
    twice = SESSION.repeated(2)
    assert [request.at_s for request in twice.requests] == [0.0, 0.0, 0.0, 0.0, 2.0, 2.0]
    assert [request.after for request in twice.requests] == [None, None, 0, 1, None, None]
    ids = [set(request.block_ids()) for request in twice.requests]
    assert not (ids[0] | ids[2] | ids[4]) & (ids[1] | ids[3] | ids[5])


def test_shrunk_when_lengths_cannot_be_divided_is_refused() -> None:
    with pytest.raises(BadInput, match="32 tokens"):
        SESSION.shrunk(5)
    with pytest.raises(BadInput, match="texts"):
        _schedule(PlannedRequest(at_s=0.0, input_tokens=2, output_tokens=1, text="A question")).shrunk(2)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 32)), min_size=1, max_size=20), st.sampled_from([1, 2, 4, 8, 16]))
def test_shrunk_keeps_what_prompts_share_and_what_of_it_can_be_reused(chosen: list[tuple[int, int]], divisor: int) -> None:
    # Prompts are ways through a tree: node n's parent is (n - 1) // 2.
    requests = []
    for node, filled in chosen:
        ids = [node]
        while ids[0]:
            ids.insert(0, (ids[0] - 1) // 2)
        tokens = 32 * (len(ids) - 1) + filled
        requests.append(PlannedRequest(at_s=0.0, input_tokens=tokens, output_tokens=9, block_runs=mooncake.runs_of(ids)))
    schedule = _schedule(*requests)
    small = schedule.shrunk(divisor)
    assert small.block_size * divisor == 32
    for request, smaller in zip(schedule.requests, small.requests, strict=True):
        assert smaller.block_runs == request.block_runs
        assert smaller.input_tokens // small.block_size == request.input_tokens // 32  # full blocks
        assert usable_blocks(smaller, small.block_size) == usable_blocks(request, 32)
        assert abs(smaller.input_tokens * divisor - request.input_tokens) < max(divisor, 2)
        assert smaller.output_tokens == -(-9 // divisor)


@given(st.integers(1, 500), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_shrunk_keeps_the_number_of_blocks(input_tokens: int, divisor: int) -> None:
    blocks = -(-input_tokens // 32)
    request = PlannedRequest(at_s=0.0, input_tokens=input_tokens, output_tokens=5, block_runs=((0, blocks),))
    small = _schedule(request).shrunk(divisor)
    assert -(-small.requests[0].input_tokens // small.block_size) == blocks


@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8), min_size=1, max_size=6))
def test_mooncake_when_read_and_written_gives_the_same_rows(tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("mooncake")
    rows = [
        {"timestamp": 250.0 * index, "input_length": 512 * len(ids) - index, "output_length": 3 + index, "hash_ids": ids}
        for index, ids in enumerate(prompts)
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    schedule = mooncake.read(folder / "in.jsonl")
    assert [request.block_ids() for request in schedule.requests] == prompts
    mooncake.write(schedule, folder / "out.jsonl")
    assert [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()] == rows


def test_mooncake_when_only_full_blocks_have_ids_gives_the_rest_its_own(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    rows = [{"timestamp": 0, "input_length": length, "output_length": 2, "hash_ids": [3, 4]} for length in (11, 9, 8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [request.block_ids() for request in mooncake.read(path, block_size=4).requests] == [[3, 4, 5], [3, 4, 6], [3, 4]]


def test_mooncake_when_prompts_are_texts_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no texts"):
        mooncake.write(_schedule(PlannedRequest(at_s=0.0, input_tokens=2, output_tokens=1, text="A question")), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_mooncake_when_written_gives_later_turns_a_time(tmp_path: Path) -> None:
    mooncake.write(SESSION, tmp_path / "out.jsonl")
    times = [json.loads(line)["timestamp"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert times == [0.0, 2000.0, 3000.0]


def test_mooncake_when_stamps_are_spread_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        "".join(json.dumps({"timestamp": 3000, "input_length": 5, "output_length": 2, "hash_ids": [i]}) + "\n" for i in range(9))
    )
    first, again, other = (mooncake.read(path, spread_s=3.0, seed=seed) for seed in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    assert all(3.0 <= request.at_s < 6.0 for request in first.requests)
    assert [request.at_s for request in first.requests] == sorted(request.at_s for request in first.requests)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2, 3]},
            "line 1: hash_ids has 3 .* 2 of 512 .* 1 of them full",
        ),
        ({"timestamp": 0, "input_length": 0, "output_length": 2, "hash_ids": []}, "line 1.*>= 1.*input_length"),
        ({"timestamp": 0, "input_length": 6, "output_length": 2}, "line 1.*hash_ids"),
        ({"timestamp": 0, "input_length": "6", "output_length": 2, "hash_ids": [1]}, "line 1.*input_length"),
    ],
)
def test_mooncake_when_a_row_is_wrong_names_it(tmp_path: Path, row: dict[str, object], message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInput, match=message):
        mooncake.read(path)
