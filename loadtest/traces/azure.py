"""Azure's LLM inference traces, a CSV of `TIMESTAMP,ContextTokens,GeneratedTokens`.

They do not say what prompts had in common: every request gets blocks of its own, and no cache can help.
Source: github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023; Patel et al. 2024 (Splitwise, ISCA '24).
"""

from datetime import UTC, datetime
from pathlib import Path

import msgspec

from loadtest.files import BadInput, open_text, read_csv_rows
from loadtest.schedule import PlannedRequest, Schedule, Tokens
from loadtest.traces.block_ids import BlockIds


class _Row(msgspec.Struct, frozen=True):
    timestamp: str = msgspec.field(name="TIMESTAMP")
    input_tokens: Tokens = msgspec.field(name="ContextTokens")
    output_tokens: Tokens = msgspec.field(name="GeneratedTokens")


def read(path: Path, *, block_size: int) -> Schedule:
    """The trace as it is, its first request at 0.

    Raises BadInput for a row that cannot be read.
    """
    rows: list[tuple[datetime, _Row]] = []
    with open_text(path, "r") as file:
        for number, row in read_csv_rows(file, _Row, path):
            rows.append((_time(row.timestamp, f"{path}, line {number}"), row))
    rows.sort(key=lambda pair: pair[0])
    block_ids = BlockIds()
    requests = tuple(
        PlannedRequest(
            at_s=(time - rows[0][0]).total_seconds(),
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            block_runs=(block_ids.take_for(row.input_tokens, block_size),),
        )
        for time, row in rows
    )
    return Schedule(block_size=block_size, requests=requests, source=f"{path.name}; what prompts share is not recorded")


def _time(text: str, where: str) -> datetime:
    """The release of 2023 has no time zone, that of 2024 has one: all are UTC. Less than a microsecond is cut off."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(f"{where}: TIMESTAMP is {text!r}, no time like 2023-11-16 18:15:46.6805900") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
