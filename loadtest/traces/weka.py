"""Sessions of coding agents, JSON Lines with one session each: every turn sends the whole conversation again, a little longer.

    id, block_size                of the session
    tool_tokens, system_tokens    the head of its prompts: tools, then the system prompt
    requests                      t (s from the session's start), in, out (tokens), api_time, think_time (s), hash_runs

`hash_runs` is [first, count, first, count, …]: the full blocks of the prompt, numbered within the session. What is behind the last full
block belongs to nobody else and gets an id of its own. Sessions with tools of equal length are taken to have the same tools, and with
tools and system prompts of equal lengths the same head: they share its blocks, as they do in production. Turns wait for the one before.
Source: github.com/callanjfox/kv-cache-tester, its traces written in this shorter form.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from loadtest.files import BadInput, open_text, read_numbered_rows
from loadtest.schedule import BlockId, PlannedRequest, Schedule, Seconds, Tokens
from loadtest.traces.arrivals import Stream, arrival_times
from loadtest.traces.block_ids import BlockIds

SESSION_RATE = 0.02  # a session lasts about an hour, so that some 70 are at work at a time


class _Turn(msgspec.Struct, frozen=True):
    t: Seconds
    input_tokens: Tokens = msgspec.field(name="in")
    output_tokens: Annotated[int, msgspec.Meta(ge=0)] = msgspec.field(name="out")
    hash_runs: list[BlockId]
    api_time: Seconds = 0.0
    think_time: Seconds | None = None


class _Session(msgspec.Struct, frozen=True):
    id: str
    block_size: Tokens
    tool_tokens: Annotated[int, msgspec.Meta(ge=0)]
    system_tokens: Annotated[int, msgspec.Meta(ge=0)]
    requests: Annotated[list[_Turn], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of a session's own numbers and the id that the first of them has among all."""

    first: int
    count: int
    block_id: int


def read(path: Path, *, session_rate: float = SESSION_RATE, seed: int = 0) -> Schedule:
    """All sessions, which start at the times of a Poisson process; requests in the order in which they were recorded to come.

    session_rate   starts a second
    Raises BadInput for a session that cannot be read, or whose blocks do not fit its lengths or those of the sessions before.
    """
    sessions: list[tuple[int, _Session]] = []
    with open_text(path, "r") as file:
        for number, session in read_numbered_rows(file, _Session, path):
            _check(session, sessions[0][1].block_size if sessions else session.block_size, f"{path}, line {number}")
            sessions.append((number, session))
    if not sessions:
        return Schedule(block_size=1, requests=(), source=path.name, seed=seed)
    starts_s = arrival_times(len(sessions), rate=session_rate, seed=seed, stream=Stream.SESSIONS)
    block_ids = BlockIds()
    heads: dict[tuple[int, ...], int] = {}
    turns = [
        (start_s + turn.t, number, position, request)
        for start_s, (number, session) in zip(starts_s, sessions, strict=True)
        for position, (turn, request) in enumerate(zip(session.requests, _requests(session, start_s, block_ids, heads), strict=True))
    ]
    # A session's turns keep their order: t never falls in it.
    turns.sort(key=lambda entry: entry[:3])
    indexes = {(number, position): index for index, (_, number, position, _) in enumerate(turns)}
    requests = tuple(
        msgspec.structs.replace(request, after=indexes[number, position - 1]) if position else request
        for _, number, position, request in turns
    )
    source = f"{path.name}; sessions start {session_rate:g}/s, seed {seed}"
    return Schedule(block_size=sessions[0][1].block_size, requests=requests, source=source, seed=seed)


def _check(session: _Session, block_size: int, where: str) -> None:
    if session.block_size != block_size:
        raise BadInput(f"{where}: block_size is {session.block_size}, {block_size} in the sessions before")
    before_s = 0.0
    for index, turn in enumerate(session.requests):
        if turn.t < before_s:
            raise BadInput(f"{where}: requests[{index}].t is {turn.t:g}, before the one ahead of it at {before_s:g}")
        before_s = turn.t
        if len(turn.hash_runs) % 2:
            raise BadInput(f"{where}: requests[{index}].hash_runs has {len(turn.hash_runs)} numbers, they come in pairs")
        if (found := sum(turn.hash_runs[1::2])) != (expected := turn.input_tokens // block_size):
            raise BadInput(
                f"{where}: requests[{index}].hash_runs has {found} blocks, "
                f"an input of {turn.input_tokens} tokens has {expected} full ones of {block_size}"
            )


def _requests(session: _Session, start_s: float, block_ids: BlockIds, heads: dict[tuple[int, ...], int]) -> Iterator[PlannedRequest]:
    """A session's turns in order, without `after`.

    heads   ids of the heads that sessions have shared so far: (tools,) and (tools, system prompt), in tokens → their first block's id
    """
    pieces = _pieces(session, block_ids, heads)
    for index, turn in enumerate(session.requests):
        runs = list(_translated(turn, pieces))
        if turn.input_tokens % session.block_size:
            runs.append(block_ids.take(1))
        yield PlannedRequest(
            at_s=0.0 if index else start_s + turn.t,
            input_tokens=turn.input_tokens,
            output_tokens=max(1, turn.output_tokens),  # a few turns were cut off before their first token
            block_runs=tuple(runs),
            session=session.id,
            think_s=_think_s(session.requests[index - 1], turn) if index else 0.0,
        )


def _pieces(session: _Session, block_ids: BlockIds, heads: dict[tuple[int, ...], int]) -> list[_Piece]:
    """What becomes of the session's numbers: those of its head may be shared, all others are its own."""
    first_runs = session.requests[0].hash_runs
    # The head must be the beginning of the first prompt, in one run; of a head in pieces only the first is shared.
    start, in_one_run = (first_runs[0], first_runs[1]) if first_runs else (0, 0)
    num_tool = min(session.tool_tokens // session.block_size, in_one_run)
    num_head = min((session.tool_tokens + session.system_tokens) // session.block_size, in_one_run)
    numbers = [number for turn in session.requests for number in (first + count for first, count in _pairs(turn))]
    end = max(numbers, default=0)

    def shared(key: tuple[int, ...], count: int) -> int:
        if (key := (*key, count)) not in heads:
            heads[key] = block_ids.take(count)[0]
        return heads[key]

    own_id, _ = block_ids.take(end)  # those of the head's numbers stay unused
    return [
        _Piece(0, start, own_id),
        _Piece(start, num_tool, shared((session.tool_tokens,), num_tool)),
        _Piece(start + num_tool, num_head - num_tool, shared((session.tool_tokens, session.system_tokens), num_head - num_tool)),
        _Piece(start + num_head, end - start - num_head, own_id + start + num_head),
    ]


def _pairs(turn: _Turn) -> Iterator[tuple[int, int]]:
    return zip(turn.hash_runs[::2], turn.hash_runs[1::2], strict=True)


def _translated(turn: _Turn, pieces: list[_Piece]) -> Iterator[tuple[int, int]]:
    for first, count in _pairs(turn):
        for piece in pieces:
            begin, end = max(first, piece.first), min(first + count, piece.first + piece.count)
            if begin < end:
                yield piece.block_id + begin - piece.first, end - begin


def _think_s(before: _Turn, turn: _Turn) -> float:
    """Where it was not recorded: what the times leave between the answer and this turn."""
    return turn.think_time if turn.think_time is not None else max(0.0, turn.t - before.t - before.api_time)
