"""Text files of rows, compressed or not, read with the error a user can act on: which file, which line, which field."""

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Literal, TypeVar, cast

import msgspec

Row = TypeVar("Row", bound=msgspec.Struct)


class BadInput(ValueError):
    """A file or an option that cannot be used; its text is for the user."""


def open_text(path: Path, mode: Literal["r", "w"]) -> IO[str]:
    """Opens a text file, compressed when its name ends in .gz. Raises BadInput when it cannot be."""
    try:
        if path.suffix == ".gz":
            return cast(IO[str], gzip.open(path, f"{mode}t", encoding="utf-8", newline=""))
        return path.open(mode, encoding="utf-8", newline="")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None


def read_rows(lines: Iterable[str], row_type: type[Row], path: Path, *, first_line: int = 1) -> Iterator[Row]:
    """The rows of a JSON Lines file, empty lines left out. Raises BadInput for one that is not of this type."""
    decoder = msgspec.json.Decoder(row_type)
    for number, line in enumerate(lines, first_line):
        if not line.strip():
            continue
        try:
            yield decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise BadInput(f"{path}, line {number}: {error}") from None
