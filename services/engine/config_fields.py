"""Typed access to the JSON objects beside a checkpoint's weights: every complaint names the file and the key."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.core.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it is missing or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("no such file", path=str(path)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not readable as JSON ({error})", path=str(path)) from None
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", path=str(path))
    return value


class Fields:
    """A parsed JSON object and the path it came from. Every method raises CheckpointError when the key's value is not what it is asked for;
    null is taken as absent, and what is absent without a default is an error."""

    def __init__(self, raw: Mapping[str, Any], path: str) -> None:
        self.raw = raw
        self.path = path

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{key}: {problem}", path=self.path)

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, f"{value!r} is not a number")
        return float(value)

    def positive(self, key: str, *, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, f"{value!r} is not a positive integer")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"{value!r} is not true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.raw.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
            raise self.error(key, f"{value!r} is not a token id or a list of them")
        return tuple(ids)
