"""Logs of a process: one JSON object a line on stderr (or one plain line for people), with the request that a line is about.

`request_id` is a context variable: a handler sets it once, and everything logged below it carries it, tasks included.
"""

import contextvars
import json
import logging
import sys
import time
from typing import TextIO

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def configure_logging(service: str, *, as_json: bool, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Sends all logs of this process to `stream` (stderr); call once, at the start."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service) if as_json else TextFormatter(f"%(asctime)s {service} %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    """request_id, if known, and the `extra` fields."""
    current = request_id.get()
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    return {"request_id": current, **extra} if current else extra


class TextFormatter(logging.Formatter):
    """The message and then name=value for what JsonFormatter has as fields."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in _facts(record).items())])


class JsonFormatter(logging.Formatter):
    """time, level, service, logger, message, request_id if known, `extra` fields, exception."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _facts(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)
