"""The last words of a process: JSON lines as people read them, all else as it is."""

import io
import logging
from pathlib import Path

from services.cli.log_tail import MAX_LINES, last_lines
from services.mesh.logs import JsonFormatter


def test_last_lines_when_the_log_is_of_mesh_logs_shows_level_message_and_the_exception_in_one_line(tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("decode"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.info("model loaded")
    try:
        raise ValueError("no such tensor")
    except ValueError:
        logger.exception("cannot start")
    log = tmp_path / "decode-0.log"
    log.write_text(stream.getvalue())
    assert last_lines(log) == ["info: model loaded", "error: cannot start (ValueError: no such tensor)"]


def test_last_lines_when_lines_are_text_leaves_them_and_drops_empty_ones(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b'Traceback\n  File "x"\n\n[1, 2]\n"text"\n{"no": "message"}\n\xff\n')
    assert last_lines(log) == ["Traceback", '  File "x"', "[1, 2]", '"text"', '{"no": "message"}', "\N{REPLACEMENT CHARACTER}"]


def test_last_lines_when_the_log_is_long_reads_only_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {number} {'x' * 100}\n" for number in range(5000)))
    lines = last_lines(log)
    assert len(lines) == MAX_LINES
    assert lines[-1].startswith("line 4999 ") and lines[0].startswith(f"line {5000 - MAX_LINES} ")
    assert [line[:9] for line in last_lines(log, 2)] == ["line 4998", "line 4999"]


def test_last_lines_when_there_is_no_log_are_none(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "nothing") == []
