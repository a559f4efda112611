"""Mooncake's JSON Lines: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (chained content blocks of 512 tokens).

The last block, partly filled, has an id like the others, or none; it is then its request's own.

Read and written: other tools take schedules in this form. Sessions are lost in it: a later turn has the time at which it would come if
every answer took no time at all.
Source: Qin et al. 2025 (Mooncake, FAST '25), its released traces; LLMServingSim's ShareGPT trace has the same form with 16-token blocks.
"""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadtest.files import BadInput, open_text, read_numbered_rows
from loadtest.schedule import BlockId, PlannedRequest, Schedule, Seconds, Tokens

BLOCK_SIZE = 512


class _Row(msgspec.Struct, frozen=True):
    timestamp: Seconds  # in thousandths
    input_length: Tokens
    output_length: Tokens
    hash_ids: list[BlockId]


def read(path: Path, *, block_size: int = BLOCK_SIZE, spread_s: float = 0.0, seed: int = 0) -> Schedule:
    """The trace as it is; `spread_s` moves each request by a random time below it, where stamps were recorded on a grid.

    Raises BadInput for a row whose blocks do not fit its length.
    """
    with open_text(path, "r") as file:
        rows = []
        for number, row in read_numbered_rows(file, _Row, path):
            if len(row.hash_ids) not in ((full := row.input_length // block_size), expected := -(-row.input_length // block_size)):
                raise BadInput(
                    f"{path}, line {number}: hash_ids has {len(row.hash_ids)} blocks, "
                    f"an input_length of {row.input_length} has {expected} of {block_size} tokens, {full} of them full (--block-size)"
                )
            rows.append(row)
    rng = random.Random(seed)
    own_ids = itertools.count(1 + max((block_id for row in rows for block_id in row.hash_ids), default=-1))
    requests = []
    for row in rows:
        has_all = len(row.hash_ids) * block_size >= row.input_length
        requests.append(
            PlannedRequest(
                at_s=row.timestamp / 1e3 + (rng.random() * spread_s if spread_s else 0.0),
                input_tokens=row.input_length,
                output_tokens=row.output_length,
                block_runs=runs_of(row.hash_ids if has_all else [*row.hash_ids, next(own_ids)]),
            )
        )
    requests.sort(key=lambda request: request.at_s)
    source = f"{path.name}; each stamp spread over {spread_s:g} s" if spread_s else path.name
    return Schedule(block_size=block_size, requests=tuple(requests), source=source, seed=seed)


def write(schedule: Schedule, path: Path) -> None:
    """Writes the schedule for other tools. Raises BadInput when its prompts are texts."""
    if any(request.text for request in schedule.requests):
        raise BadInput("Mooncake's format has no texts: they can only be kept as a schedule")
    with open_text(path, "w") as file:
        for at_s, request in sorted(zip(schedule.earliest_s, schedule.requests, strict=True), key=lambda pair: pair[0]):
            row = _Row(
                timestamp=round(at_s * 1e3, 3),
                input_length=request.input_tokens,
                output_length=request.output_tokens,
                hash_ids=request.block_ids(),
            )
            file.write(msgspec.json.encode(row).decode() + "\n")


def runs_of(block_ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Block ids as runs of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for block_id in block_ids:
        if runs and block_id == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block_id, 1))
    return tuple(runs)
