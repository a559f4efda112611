"""The end of a process's log, for people: JSON lines as their message, everything else as it is. Knows only how mesh/logs writes."""

import json
from pathlib import Path

MAX_LINES = 12
_TAIL_BYTES = 1 << 16


def last_lines(log: Path, count: int = MAX_LINES) -> list[str]:
    """The last `count` lines that say something; none when there is no log. An exception is shown by its last line alone."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for raw in text.splitlines() if (line := _readable(raw))][-count:]


def _readable(line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return line.rstrip()
    if not isinstance(entry, dict) or "message" not in entry:
        return line.rstrip()
    words = f"{entry.get('level', 'info')}: {entry['message']}"
    if isinstance(exception := entry.get("exception"), str) and exception.strip():
        words += f" ({exception.strip().splitlines()[-1]})"
    return words
