"""Text files of rows, compressed or not, read with the error a user can act on: which file, which line, which field."""

import csv
import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, TypeVar, cast

import msgspec

Row = TypeVar("Row", bound=msgspec.Struct)


class BadInput(ValueError):
    """A file or an option that cannot be used; its text is for the user."""


@contextmanager
def unwrapped() -> Iterator[None]:
    """Around a task group: what the user did wrong, without the group."""
    try:
        yield
    except* BadInput as group:
        raise group.exceptions[0] from None


@contextmanager
def open_text(path: Path, mode: Literal["r", "w"]) -> Iterator[IO[str]]:
    """Opens a text file, compressed when its name ends in .gz. Raises BadInput when it cannot be opened, read to its end or written."""
    try:
        with _open(path, mode) as file:
            yield file
    except UnicodeDecodeError:
        raise BadInput(f"{path}: no text in UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path, mode: Literal["r", "w"]) -> IO[str]:
    if path.suffix == ".gz":
        return cast(IO[str], gzip.open(path, f"{mode}t", encoding="utf-8", newline=""))
    return path.open(mode, encoding="utf-8", newline="")


def read_rows(lines: Iterable[str], row_type: type[Row], path: Path, *, first_line: int = 1) -> Iterator[Row]:
    """The rows of a JSON Lines file, empty lines left out. Raises BadInput for one that is not of this type."""
    return (row for _, row in read_numbered_rows(lines, row_type, path, first_line=first_line))


def read_numbered_rows(lines: Iterable[str], row_type: type[Row], path: Path, *, first_line: int = 1) -> Iterator[tuple[int, Row]]:
    """The same, each with the number of its line."""
    decoder = msgspec.json.Decoder(row_type)
    for number, line in enumerate(lines, first_line):
        if not line.strip():
            continue
        try:
            yield number, decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise BadInput(f"{path}, line {number}: {error}") from None


def read_csv_rows(lines: Iterable[str], row_type: type[Row], path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a CSV file whose first line names its columns, each with the number of its line; other columns are left out.

    Raises BadInput for one that is not of this type.
    """
    reader = csv.DictReader(lines)
    try:
        columns = reader.fieldnames or ()
        for field in msgspec.structs.fields(row_type):
            if field.required and field.encode_name not in columns:
                raise BadInput(f"{path}, line 1: no column {field.encode_name}")
        for row in reader:
            yield reader.line_num, msgspec.convert(row, row_type, strict=False)
    except (msgspec.ValidationError, csv.Error) as error:
        raise BadInput(f"{path}, line {reader.line_num}: {error}") from None
