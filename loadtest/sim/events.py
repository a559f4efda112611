"""Virtual time: things happen in the order of their time, those of one time in the order in which they were planned. Nothing waits."""

import heapq
from collections.abc import Callable
from itertools import count


class Events:
    """`now_s` moves when run() gets to the next event; nothing else moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_happened = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Plans an action, not before now. It cannot be taken back: who changes plans has the action look whether it still counts."""
        heapq.heappush(self._heap, (max(time_s, self.now_s), next(self._order), action))

    def run(self) -> None:
        """Until nothing is planned any more."""
        heap = self._heap
        while heap:
            self.now_s, _, action = heapq.heappop(heap)
            self.num_happened += 1
            action()
