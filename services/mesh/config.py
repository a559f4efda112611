"""Settings of a process from its environment: BATON_BLOCK_SIZE is the field `block_size`, and nothing else may begin with BATON_.

A process describes its settings as one frozen dataclass; its fields' types say how text is read. All problems are reported at once, so
that one start shows all that an operator has to mend. The only place that knows the environment.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from services.core.errors import BatonError, ConfigurationError, InvalidRequest

PREFIX = "BATON_"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_USER_AND_PASSWORD = re.compile(r"(?<=://)[^/\s]*@")
_PASSWORD_IN_QUERY = re.compile(r"(?<=[?&])((?:user(?:name)?|password)=)[^&#\s]*", re.IGNORECASE)

_Settings = TypeVar("_Settings")


def load_settings(kind: type[_Settings], environ: Mapping[str, str]) -> _Settings:
    """Makes the dataclass `kind` from the environment; absent or empty variables leave the field's default.

    Fields may be str, int, float, bool, Path, tuple[str, ...] (comma-separated), each also `| None`. A `validate()` method, if there is
    one, is asked when all could be read. Raises ConfigurationError that lists every unknown name, unreadable value and missing field, or
    what validate() raised.
    """
    hints = typing.get_type_hints(kind)
    fields = {PREFIX + field.name.upper(): field for field in dataclasses.fields(typing.cast(Any, kind))}
    problems = [_unknown(name, fields) for name in sorted(environ) if name.startswith(PREFIX) and name not in fields]
    values: dict[str, Any] = {}
    for name, field in fields.items():
        text = environ.get(name, "").strip()
        if text:
            try:
                values[field.name] = _parser(hints[field.name])(text)
            except ValueError as error:
                problems.append(f"{name}: {text!r} is not {error}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{name}: is not set and has no default")
    if problems:
        raise ConfigurationError(problems)
    settings = kind(**values)
    validate: Callable[[], None] | None = getattr(settings, "validate", None)
    if validate is not None:
        try:
            validate()
        except ConfigurationError:
            raise
        except BatonError as error:
            raise ConfigurationError([_problem(error, fields)]) from error
    return settings


def environment_of(settings: Any) -> dict[str, str]:
    """The variables from which load_settings makes an equal dataclass.

    Raises ConfigurationError where there are none: a list's item with a comma, None where the default is something, limits overstepped.
    """
    variables = {}
    given = dataclasses.asdict(settings)
    for name, value in given.items():
        text = ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
        if text:
            variables[PREFIX + name.upper()] = text
    read = load_settings(type(settings), variables)
    lost = [name for name, value in given.items() if getattr(read, name) != value]
    if lost:
        raise ConfigurationError([f"{PREFIX}{name.upper()}: no text means {given[name]!r}" for name in lost])
    return variables


def printable(settings: Any) -> dict[str, object]:
    """The settings as logs may show them: without user and password in addresses."""
    return {name: _masked(value) if isinstance(value, str) else value for name, value in dataclasses.asdict(settings).items()}


def _masked(text: str) -> str:
    # Both are ways in which redis-py takes them: redis://user:password@host and redis://host?password=…
    return _PASSWORD_IN_QUERY.sub(r"\1***", _USER_AND_PASSWORD.sub("***@", text))


def _problem(error: BatonError, fields: Mapping[str, object]) -> str:
    """What validate() found, in the name by which an operator sets it."""
    if isinstance(error, InvalidRequest) and (name := PREFIX + error.field.upper()) in fields:
        return name + error.message.removeprefix(error.field)
    return error.message


def _unknown(name: str, fields: Mapping[str, object]) -> str:
    return f"{name}: no such setting; this process knows {', '.join(sorted(fields))}"


def _parser(hint: Any) -> Callable[[str], Any]:
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if isinstance(hint, types.UnionType):
        assert len(options) == 1, f"no way to read {hint}"
        return _parser(options[0])
    if typing.get_origin(hint) is tuple:
        assert options == [str, ...], f"no way to read {hint}"
        return lambda text: tuple(part.strip() for part in text.split(",") if part.strip())
    return _PARSERS[hint]


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("an integer") from None


def _parse_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("a number") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("a finite number")
    return value


def _parse_bool(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(f"one of {', '.join(_TRUE + _FALSE)}")
    return text.lower() in _TRUE


_PARSERS: dict[Any, Callable[[str], Any]] = {str: str, int: _parse_int, float: _parse_float, bool: _parse_bool, Path: Path}
