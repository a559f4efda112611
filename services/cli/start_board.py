"""What happens to the processes of a mesh, on the terminal: a line for each while they start, afterwards a line for each event.

On a terminal the lines of the start change in place; in a pipe or a file each change is a line of its own.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


class StartBoard:
    """`report` may be called at any time; within starting() it moves the board, if there is one."""

    def __init__(self, names: Sequence[str], console: Console) -> None:
        self._console = console
        self._words = dict.fromkeys(names, "waiting for its turn")
        self._width = max(map(len, names), default=0)
        self._live: Live | None = None
        self._began = time.monotonic()

    @contextlib.contextmanager
    def starting(self, title: str) -> Iterator[None]:
        """While the block lasts, the board is on the terminal; its last state stays there."""
        self._began = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(title, markup=False)
            yield
            return
        spinner = Spinner("dots", Text(title))
        self._live = Live(get_renderable=lambda: self._view(spinner), console=self._console, refresh_per_second=10)
        try:
            with self._live:
                yield
                spinner.update(text=Text(f"{title}: done in {time.monotonic() - self._began:.1f} s"))
        finally:
            self._live = None

    def report(self, name: str, words: str) -> None:
        """Something has happened to a process."""
        self._words[name] = words
        if self._live is None:
            self._print(f"{time.strftime('%H:%M:%S')}  {name:<{self._width}}  {words}")

    def say(self, words: str) -> None:
        """Something that is about no process, on a line of its own."""
        self._print(f"\n{words}")

    def _print(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed: what is said must not keep the mesh from stopping
            self._console.print(line, markup=False, highlight=False)

    def _view(self, spinner: Spinner) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, words in self._words.items():
            table.add_row(Text(f"  {name}", style="bold"), Text(words))
        return Group(spinner, table)
