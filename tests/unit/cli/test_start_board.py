"""The board of a start: in a pipe a line for each change, on a terminal one that changes in place."""

import io
import re

from rich.console import Console

from services.cli.start_board import StartBoard


def test_board_when_there_is_no_terminal_prints_a_line_for_each_change() -> None:
    file = io.StringIO()
    board = StartBoard(["redis", "decode-0"], Console(file=file, width=80))
    with board.starting("starting 2 processes"):
        board.report("redis", "serving after 0.1 s")
        board.report("decode-0", "up at [router-0]")
    board.report("decode-0", "killed by SIGKILL; starts again in 0.1 s")
    lines = [re.sub(r"^\d\d:\d\d:\d\d", "TIME", line) for line in file.getvalue().splitlines()]
    assert lines == [
        "starting 2 processes",
        "TIME  redis     serving after 0.1 s",
        "TIME  decode-0  up at [router-0]",
        "TIME  decode-0  killed by SIGKILL; starts again in 0.1 s",
    ]


def test_board_when_there_is_a_terminal_leaves_the_last_state_of_each_process_and_the_time_it_took() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, record=True, color_system=None)
    board = StartBoard(["redis", "decode-0"], console)
    with board.starting("starting 2 processes"):
        board.report("redis", "starting")
        board.report("redis", "serving after 0.1 s")
    board.report("redis", "stopped")
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert re.fullmatch(r".*starting 2 processes: done in \d+\.\d s", lines[-4])
    assert lines[-3:-1] == ["  redis     serving after 0.1 s", "  decode-0  waiting for its turn"]
    assert re.fullmatch(r"\d\d:\d\d:\d\d  redis     stopped", lines[-1])


def test_board_when_the_terminal_is_gone_says_nothing_and_goes_on() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    board = StartBoard(["redis"], Console(file=Gone(), width=80))
    board.say("stopping")
    board.report("redis", "stopped")
