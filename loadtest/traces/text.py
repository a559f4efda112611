"""Prompts that are real texts, JSON Lines of one of these forms, with `input_tokens` and `output_tokens` where they are known.

    {"turns": [..]}                  a conversation's questions, as MT-bench has them
    {"prompt": ".."}, {"text": ".."}   one prompt

When they come is drawn. A later turn is a request of the same session whose prompt is all questions so far, a blank line between them. The
answers are not in it: a schedule is fixed before anybody has answered, so that every run of it asks for the same.
Source: Zheng et al. 2023 (MT-bench), FastChat's question file.
"""

from pathlib import Path
from typing import Annotated

import msgspec

from loadtest.files import BadInput, open_text, read_numbered_rows
from loadtest.schedule import PlannedRequest, Schedule, Tokens
from loadtest.traces.arrivals import arrival_times

OUTPUT_TOKENS = 128
BYTES_PER_TOKEN = 4

_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _Row(msgspec.Struct, frozen=True):
    turns: Annotated[list[_Text], msgspec.Meta(min_length=1)] | None = None
    prompt: _Text | None = None
    text: _Text | None = None
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None


def read(
    path: Path,
    *,
    block_size: int,
    rate: float = 1.0,
    burstiness: float = 1.0,
    think_s: float = 0.0,
    output_tokens: int = OUTPUT_TOKENS,
    seed: int = 0,
) -> Schedule:
    """The prompts in the file's order, sessions one after another.

    block_size      of the schedule: the texts have no blocks
    rate            first turns a second
    burstiness      of their arrivals
    think_s         between an answer and the next turn
    output_tokens   where the file does not say
    Raises BadInput for a row that has none of these forms, or more than one.
    """
    rows: list[tuple[list[str], _Row]] = []
    with open_text(path, "r") as file:
        for number, row in read_numbered_rows(file, _Row, path):
            rows.append((_turns(row, f"{path}, line {number}"), row))
    times_s = arrival_times(len(rows), rate=rate, burstiness=burstiness, seed=seed)
    requests: list[PlannedRequest] = []
    for index, (at_s, (turns, row)) in enumerate(zip(times_s, rows, strict=True)):
        for turn in range(len(turns)):
            text = "\n\n".join(turns[: turn + 1])
            requests.append(
                PlannedRequest(
                    at_s=0.0 if turn else at_s,
                    input_tokens=row.input_tokens or estimated_tokens(text),
                    output_tokens=row.output_tokens or output_tokens,
                    session=f"text-{index}" if len(turns) > 1 else "",
                    after=len(requests) - 1 if turn else None,
                    think_s=think_s if turn else 0.0,
                    text=text,
                )
            )
    return Schedule(block_size=block_size, requests=tuple(requests), source=f"{path.name}; {rate:g}/s, seed {seed}", seed=seed)


def estimated_tokens(text: str) -> int:
    """What a text may have in tokens: a quarter of its bytes, about what the vocabularies of large models need for English."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def _turns(row: _Row, where: str) -> list[str]:
    forms = [form for form in (row.turns, row.prompt and [row.prompt], row.text and [row.text]) if form]
    if len(forms) != 1:
        raise BadInput(f"{where}: needs one of turns, prompt and text, has {len(forms)}")
    if row.input_tokens is not None and len(forms[0]) > 1:
        raise BadInput(f"{where}: input_tokens cannot be said of {len(forms[0])} turns")
    return forms[0]
