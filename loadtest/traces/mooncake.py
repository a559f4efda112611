"""Mooncake's JSON Lines: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (chained content blocks of 512 tokens).

Read and written: other tools take schedules in this form. Sessions are lost in it: a later turn has the time at which it would come if
every answer took no time at all.
Source: Qin et al. 2025 (Mooncake, FAST '25), its released traces; LLMServingSim's ShareGPT trace has the same form with 16-token blocks.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadtest.files import BadInput, open_text, read_rows
from loadtest.schedule import PlannedRequest, Schedule

BLOCK_SIZE = 512


class _Row(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read(path: Path, *, block_size: int = BLOCK_SIZE, spread_s: float = 0.0, seed: int = 0) -> Schedule:
    """The trace as it is; `spread_s` moves each request by a random time below it, where stamps were recorded on a grid.

    Raises BadInput for a row whose blocks do not fit its length.
    """
    rng = random.Random(seed)
    requests = []
    with open_text(path, "r") as file:
        for number, row in enumerate(read_rows(file, _Row, path), 1):
            if row.input_length < 1 or row.output_length < 1 or row.timestamp < 0:
                raise BadInput(f"{path}, request {number}: lengths must be at least 1, the timestamp at least 0")
            if (expected := -(-row.input_length // block_size)) != len(row.hash_ids):
                raise BadInput(
                    f"{path}, request {number}: hash_ids has {len(row.hash_ids)} blocks, "
                    f"an input_length of {row.input_length} has {expected} of {block_size} tokens (--block-size)"
                )
            at_s = row.timestamp / 1e3 + (rng.random() * spread_s if spread_s else 0.0)
            requests.append(
                PlannedRequest(at_s=at_s, input_tokens=row.input_length, output_tokens=row.output_length, block_runs=runs_of(row.hash_ids))
            )
    requests.sort(key=lambda request: request.at_s)
    source = f"{path.name}; each stamp spread over {spread_s:g} s" if spread_s else path.name
    return Schedule(block_size=block_size, requests=tuple(requests), source=source, seed=seed)


def write(schedule: Schedule, path: Path) -> None:
    """Writes the schedule for other tools."""
    times: list[float] = []
    with open_text(path, "w") as file:
        for request in schedule.requests:
            times.append(request.at_s if request.after is None else times[request.after] + request.think_s)
        for at_s, request in sorted(zip(times, schedule.requests, strict=True), key=lambda pair: pair[0]):
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
