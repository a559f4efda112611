"""Readers of others' traces: each from a few lines written here."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.ceilings import infinite_reuse
from loadtest.files import BadInput
from loadtest.schedule import Schedule
from loadtest.traces import azure, servegen, text, weka

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
SERVEGEN = "timestamp_s,tenant,input_length,output_length\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(contents: str) -> Path:
        path = tmp_path / "trace"
        path.write_text(contents)
        return path

    return write


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_azure_gives_each_request_blocks_of_its_own_and_begins_at_zero(write: Callable[[str], Path]) -> None:
    # In another order than they came, one with the time zone of the second release, hundreds of nanoseconds cut off.
    path = write(f"{AZURE}2023-11-16 18:15:47.6805909,9,44\r\n2023-11-16 18:15:46.6805900,4,1\r\n2023-11-16 18:16:46.680590+00:00,5,2\r\n")
    schedule = azure.read(path, block_size=4)
    assert [request.at_s for request in schedule.requests] == [0.0, 1.0, 60.0]
    assert [(request.input_tokens, request.output_tokens) for request in schedule.requests] == [(4, 1), (9, 44), (5, 2)]
    assert [request.block_ids() for request in schedule.requests] == [[0], [1, 2, 3], [4, 5]]


def test_servegen_keeps_tenants(write: Callable[[str], Path]) -> None:
    schedule = servegen.read(write(f"{SERVEGEN}2.5,143,6,5\n0.001,b,3,2\n"), block_size=4)
    assert [(request.at_s, request.tenant) for request in schedule.requests] == [(0.001, "b"), (2.5, "143")]
    assert [request.block_ids() for request in schedule.requests] == [[0], [1, 2]]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("TIMESTAMP,ContextTokens\n", "line 1: no column GeneratedTokens"),
        ("", "line 1: no column TIMESTAMP"),
        (f"{AZURE}2023-11-16 18:15:46,3,1\nnoon,3,1\n", "line 3: TIMESTAMP is 'noon'"),
        (f"{AZURE}2023-11-16 18:15:46,3,0\n", "line 2: .*>= 1.*GeneratedTokens"),
        (f"{AZURE}2023-11-16 18:15:46,3.5,1\n", "line 2: .*ContextTokens"),
        (f"{AZURE}2023-11-16 18:15:46,3\n", "line 2: .*GeneratedTokens"),
    ],
)
def test_azure_when_a_row_is_wrong_names_line_and_field(write: Callable[[str], Path], contents: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        azure.read(write(contents), block_size=4)


@pytest.mark.parametrize("stamp", ["-1", "inf", "nan", "soon"])
def test_servegen_when_a_time_is_none_names_line_and_field(write: Callable[[str], Path], stamp: str) -> None:
    with pytest.raises(BadInput, match=r"line 3: .*timestamp_s"):
        servegen.read(write(f"{SERVEGEN}0,a,3,2\n{stamp},a,3,2\n"), block_size=4)


def _turn(t: float, tokens: int, runs: list[int], **fields: Any) -> dict[str, Any]:
    return {"t": t, "type": "s", "in": tokens, "out": 5, "stop": "end_turn", "hash_runs": runs, **fields}


def _session(name: str, *turns: dict[str, Any], tool: int = 8, system: int = 8, **fields: Any) -> dict[str, Any]:
    return {"id": name, "block_size": 4, "tool_tokens": tool, "system_tokens": system, "requests": turns, **fields}


def test_weka_when_heads_are_equally_long_shares_them(write: Callable[[str], Path]) -> None:
    # Blocks of 4 tokens: 2 of tools, 2 of system prompt; the second has another system prompt, the third the first's head.
    sessions = [
        _session("a", _turn(0, 24, [1, 6])),
        _session("b", _turn(0, 26, [1, 6]), system=12),
        _session("c", _turn(0, 24, [1, 6])),
        _session("d", _turn(0, 24, [1, 6]), tool=9),
    ]
    schedule = weka.read(write(_lines(sessions)))
    a, b, c, d = ({request.session: request.block_ids() for request in schedule.requests}[name] for name in "abcd")
    assert a[:2] == b[:2] == c[:2]
    assert a[2:4] == c[2:4]
    assert len(b) == 7
    assert len({*a, *b, *c, *d}) == 6 + (7 - 2) + 2 + 6
    assert infinite_reuse(schedule) == (2 + 4) * 4 / (3 * 24 + 26)


def test_weka_when_a_head_is_in_pieces_shares_only_the_first(write: Callable[[str], Path]) -> None:
    # Of a and b the head is cut after its first block; c numbers from 5 on, and comes back to lower numbers later.
    pieces = [_turn(0, 24, [1, 1, 9, 5])]
    sessions = [_session("a", *pieces), _session("b", *pieces), _session("c", _turn(0, 24, [5, 6]), _turn(1, 24, [1, 6]))]
    schedule = weka.read(write(_lines(sessions)))
    a, b, c, later = ([*schedule.requests[i].block_ids()] for i in range(4))
    assert [len(ids) for ids in (a, b, c, later)] == [6] * 4
    assert [len({*a} & {*b}), a[0] == b[0], len({*a, *b} & {*c, *later})] == [1, True, 0]
    assert later[4:] == c[:2]
    assert not {*later[:4]} & {*c}


def test_weka_when_a_prompt_leaves_the_conversation_keeps_what_is_equal(write: Callable[[str], Path]) -> None:
    turns = [_turn(0, 24, [1, 6]), _turn(5, 30, [1, 7]), _turn(9, 32, [1, 5, 20, 3]), _turn(11, 9, [30, 2])]
    schedule = weka.read(write(_lines([_session("a", *turns)])))
    first, second, third, fourth = (request.block_ids() for request in schedule.requests)
    assert second[:6] == first
    assert third[:5] == first[:5]
    assert not {*third[5:], *fourth} & {*first, *second}
    assert len(second) == len(third) == 8  # the second's last is partly filled, and its own
    assert len(fourth) == 3


def test_weka_later_turns_wait_for_the_one_before(write: Callable[[str], Path]) -> None:
    turns = [
        _turn(0, 24, [1, 6], api_time=2.0, think_time=0.0),
        _turn(5, 24, [1, 6], api_time=1.5, think_time=2.75),
        _turn(9, 24, [1, 6]),  # not recorded: 9 - 5 - 1.5
        _turn(9, 24, [1, 6], out=0),
    ]
    schedule = weka.read(write(_lines([_session("a", *turns)])))
    assert [request.after for request in schedule.requests] == [None, 0, 1, 2]
    assert [request.think_s for request in schedule.requests] == [0.0, 2.75, 2.5, 0.0]
    assert [request.output_tokens for request in schedule.requests] == [5, 5, 5, 1]


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 3))
def test_weka_sessions_keep_their_order_and_come_in_the_order_of_time(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[list[int]], seed: int
) -> None:
    sessions = []
    for number, session in enumerate(gaps):
        turns = [_turn(sum(session[1 : i + 1]), 16 + i, [1, 4 + i // 4], api_time=0.0) for i in range(len(session))]
        sessions.append(_session(f"s{number}", *turns))
    path = tmp_path_factory.mktemp("weka") / "trace.jsonl"
    path.write_text(_lines(sessions))
    schedule = weka.read(path, session_rate=0.1, seed=seed)
    assert schedule.earliest_s == sorted(schedule.earliest_s)
    for name, session in zip((f"s{number}" for number in range(len(gaps))), gaps, strict=True):
        mine = [(index, request) for index, request in enumerate(schedule.requests) if request.session == name]
        assert [request.input_tokens for _, request in mine] == [16 + i for i in range(len(session))]
        assert [request.after for _, request in mine] == [None, *(index for index, _ in mine[:-1])]
        assert [request.think_s for _, request in mine] == [0.0, *session[1:]]


@pytest.mark.parametrize(
    ("session", "message"),
    [
        (_session("a", _turn(0, 24, [1, 5])), r"line 2: requests\[0\].hash_runs has 5 blocks, .* 24 tokens has 6"),
        (_session("a", _turn(0, 24, [1, 6, 7])), r"line 2: requests\[0\].hash_runs has 3 numbers"),
        (_session("a", _turn(9, 24, [1, 6]), _turn(8, 24, [1, 6])), r"line 2: requests\[1\].t is 8"),
        (_session("a", _turn(0, 24, [1, 6]), block_size=8), "line 2: block_size is 8, 4"),
        (_session("a"), "line 2: .*length >= 1.*requests"),
        (_session("a", _turn(0, 0, [])), r"line 2: .*>= 1.*requests\[0\].in"),
        (_session("a", _turn(0, 24, [-1, 6])), r"line 2: .*>= 0.*hash_runs"),
    ],
)
def test_weka_when_a_session_is_wrong_names_line_and_field(write: Callable[[str], Path], session: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        weka.read(write(_lines([_session("good", _turn(0, 24, [1, 6])), session])))


def test_text_later_turns_hold_the_questions_before_and_wait(write: Callable[[str], Path]) -> None:
    path = write(
        _lines([{"turns": ["Why?", "Really?"], "question_id": 81}, {"prompt": "Größe: 3 €"}, {"text": "x" * 40, "output_tokens": 7}])
    )
    schedule = text.read(path, block_size=16, rate=2.0, think_s=3.0, output_tokens=30)
    assert [request.text for request in schedule.requests] == ["Why?", "Why?\n\nReally?", "Größe: 3 €", "x" * 40]
    assert [request.input_tokens for request in schedule.requests] == [1, 4, 4, 10]  # a quarter of 4, 13, 14 and 40 bytes
    assert [request.output_tokens for request in schedule.requests] == [30, 30, 30, 7]
    assert [request.after for request in schedule.requests] == [None, 0, None, None]
    assert [request.session for request in schedule.requests] == ["text-0", "text-0", "", ""]
    assert schedule.requests[1].think_s == 3.0
    assert 0 < schedule.requests[0].at_s < schedule.requests[2].at_s < schedule.requests[3].at_s


def test_text_when_the_file_says_how_long_a_prompt_is_believes_it(write: Callable[[str], Path]) -> None:
    schedule = text.read(write(_lines([{"text": "Why?", "input_tokens": 3}])), block_size=16)
    assert schedule.requests[0].input_tokens == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Why?"}, "line 2: needs one of turns, prompt and text, has 0"),
        ({"prompt": "Why?", "text": "Why?"}, "has 2"),
        ({"turns": []}, "line 2: .*turns"),
        ({"turns": ["Why?", ""]}, r"line 2: .*turns\[1\]"),
        ({"turns": ["Why?", "Why?"], "input_tokens": 2}, "line 2: input_tokens"),
        ({"prompt": "Why?", "output_tokens": 0}, "line 2: .*>= 1.*output_tokens"),
    ],
)
def test_text_when_a_row_is_wrong_names_line_and_field(write: Callable[[str], Path], row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        text.read(write(_lines([{"text": "Why?"}, row])), block_size=16)


@pytest.mark.parametrize(("contents", "read"), [("", weka.read), (AZURE, azure.read), (SERVEGEN, servegen.read), ("\n", text.read)])
def test_trace_when_there_is_nothing_in_it_is_empty(write: Callable[[str], Path], contents: str, read: Callable[..., Schedule]) -> None:
    options = {} if read is weka.read else {"block_size": 4}
    assert len(read(write(contents), **options)) == 0
