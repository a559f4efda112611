"""Log lines: each is one JSON object (or one line for people) and knows its request."""

import asyncio
import datetime
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from services.mesh import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What configure_logging writes to; the root logger is as before afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_log_when_written_has_time_level_service_logger_message_and_extra_fields(stream: io.StringIO) -> None:
    logs.configure_logging("router", as_json=True, stream=stream)
    before = datetime.datetime.now(datetime.UTC)
    logging.getLogger("services.router").warning("worker %s is %s", "a:1", "zażółć\nsilent", extra={"age_s": 1.5, "why": OSError("gone")})
    (line,) = lines(stream)
    assert "zażółć" in stream.getvalue()  # to be found by grep
    time = datetime.datetime.fromisoformat(line.pop("time"))
    assert datetime.timedelta(milliseconds=-1) <= time - before < datetime.timedelta(minutes=1)
    assert line == {
        "level": "warning",
        "service": "router",
        "logger": "services.router",
        "message": "worker a:1 is zażółć\nsilent",
        "age_s": 1.5,
        "why": "gone",
    }


def test_json_log_when_an_exception_is_logged_has_its_traceback_in_the_same_line(stream: io.StringIO) -> None:
    logs.configure_logging("router", as_json=True, stream=stream)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("x").exception("failed")
    (line,) = lines(stream)
    assert line["message"] == "failed" and line["level"] == "error"
    assert line["exception"].startswith("Traceback") and line["exception"].endswith("ValueError: boom")


def test_logs_when_a_handler_set_the_request_id_carry_it_below_tasks_included_and_nowhere_else(stream: io.StringIO) -> None:
    logs.configure_logging("router", as_json=True, stream=stream)
    log = logging.getLogger("x")

    async def below(name: str) -> None:
        await asyncio.sleep(0)
        log.info(name)

    async def handle(name: str) -> None:
        logs.request_id.set(name)
        await asyncio.gather(below(name), asyncio.create_task(below(name)))

    async def main() -> None:
        await asyncio.gather(*(asyncio.create_task(handle(name)) for name in ("a", "b")))
        log.info("outside")

    asyncio.run(main())
    assert sorted((line["message"], line.get("request_id")) for line in lines(stream)) == [("a", "a")] * 2 + [("b", "b")] * 2 + [
        ("outside", None)
    ]


def test_logs_when_a_line_names_a_request_itself_show_that_one(stream: io.StringIO) -> None:
    logs.configure_logging("router", as_json=True, stream=stream)
    token = logs.request_id.set("mine")
    try:
        logging.getLogger("x").info("about another", extra={"request_id": "other"})
    finally:
        logs.request_id.reset(token)
    assert lines(stream)[0]["request_id"] == "other"


def test_text_log_when_written_has_message_request_and_extra_fields_in_a_line(stream: io.StringIO) -> None:
    logs.configure_logging("router", as_json=False, stream=stream)
    token = logs.request_id.set("r1")
    try:
        logging.getLogger("x").info("starting", extra={"settings": {"listen": "a:1"}})
    finally:
        logs.request_id.reset(token)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} router INFO starting request_id=r1 settings=\{'listen': 'a:1'\}\n", stream.getvalue()
    )


def test_text_and_json_logs_when_both_see_a_record_do_not_see_each_others_fields(stream: io.StringIO) -> None:
    logs.configure_logging("router", as_json=False, stream=io.StringIO())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter("router"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("x").info("hello")
    assert set(lines(stream)[0]) == {"time", "level", "service", "logger", "message"}


@pytest.mark.parametrize(("level", "messages"), [("DEBUG", ["d", "i"]), ("INFO", ["i"]), ("WARNING", [])])
def test_configure_logging_when_given_a_level_leaves_out_what_is_below(stream: io.StringIO, level: str, messages: list[str]) -> None:
    logs.configure_logging("router", as_json=True, level=level, stream=stream)
    logging.getLogger("x").debug("d")
    logging.getLogger("x").info("i")
    assert [line["message"] for line in lines(stream)] == messages


def test_configure_logging_when_called_again_replaces_the_handler(stream: io.StringIO) -> None:
    other = io.StringIO()
    logs.configure_logging("router", as_json=True, stream=other)
    logs.configure_logging("decode", as_json=True, stream=stream)
    logging.getLogger("x").info("once")
    assert [line["service"] for line in lines(stream)] == ["decode"]
    assert not other.getvalue()
