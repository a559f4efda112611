"""Requests of many tenants, a CSV of `timestamp_s,tenant,input_length,output_length`: what ServeGen's clients send, written down.

Nothing is said about what prompts have in common: every request gets blocks of its own.
Source: Xiang et al. 2025 (ServeGen), github.com/alibaba/ServeGen, which publishes the parameters of each client of a service.
"""

from pathlib import Path

import msgspec

from loadtest.files import open_text, read_csv_rows
from loadtest.schedule import PlannedRequest, Schedule, Seconds, Tokens
from loadtest.traces.block_ids import BlockIds


class _Row(msgspec.Struct, frozen=True):
    timestamp_s: Seconds
    tenant: str
    input_length: Tokens
    output_length: Tokens


def read(path: Path, *, block_size: int) -> Schedule:
    """The requests as they are.

    Raises BadInput for a row that cannot be read.
    """
    with open_text(path, "r") as file:
        rows = sorted((row for _, row in read_csv_rows(file, _Row, path)), key=lambda row: row.timestamp_s)
    block_ids = BlockIds()
    requests = tuple(
        PlannedRequest(
            at_s=row.timestamp_s,
            input_tokens=row.input_length,
            output_tokens=row.output_length,
            block_runs=(block_ids.take_for(row.input_length, block_size),),
            tenant=row.tenant,
        )
        for row in rows
    )
    return Schedule(block_size=block_size, requests=requests, source=f"{path.name}; what prompts share is not recorded")
