"""Each service × each fault × each step of a request, on one mesh of real processes: nothing wrong, nothing lost, nothing leaked.

FAULTS=all (`make faults`) runs every cell, else those of chosen_cells(). The table is printed and kept beside the logs.
"""

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster
from tests.faults.matrix import Cell, all_cells, chosen_cells
from tests.faults.strike import Matrix, Outcome, table

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs 127.0.0.2, /proc and memfd")
CELLS = all_cells() if os.environ.get("FAULTS") == "all" else chosen_cells()


class Board:
    """The cluster and its event loop, and what came of each cell."""

    def __init__(self, runner: "asyncio.Runner", matrix: Matrix, folder: Path) -> None:
        self._runner, self._matrix, self._folder = runner, matrix, folder
        self._outcomes: dict[Cell, Outcome] = {}

    def run(self, cell: Cell) -> Outcome:
        outcome = self._outcomes[cell] = self._runner.run(self._matrix.run(cell))
        (self._folder / "faults.md").write_text(table(self._outcomes))
        return outcome

    def table(self) -> str:
        return table(self._outcomes)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    folder = tmp_path_factory.mktemp("faults")
    with asyncio.Runner() as runner:
        cluster = Cluster(folder)
        runner.run(cluster.__aenter__())
        try:
            matrix = Matrix(cluster)
            runner.run(matrix.prepare())
            board = Board(runner, matrix, folder)
            yield board
            print(f"\n{board.table()}")
        finally:
            runner.run(cluster.__aexit__(None, None, None))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_requests_when_a_fault_strikes_are_right_and_whole_and_leave_nothing(board: Board, cell: Cell) -> None:
    outcome = board.run(cell)
    assert outcome.is_clean, "\n".join(outcome.notes)
