"""When a decode worker's places come free, counted in its steps: every sequence that runs gets a token in each.

Sequences that began together end together, and then a whole batch of places is free at once: a queue that is short against the batch may
wait next to nothing, or nearly as long as a sequence runs. Knows no clock and no requests.
"""

import math
from bisect import bisect_left, insort


class Departures:
    """Ends that are expected of sequences whose beginning was seen."""

    def __init__(self) -> None:
        self._ends: list[float] = []  # ascending

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, end: float, count: int) -> None:
        """So many sequences are expected to end with that step."""
        for _ in range(count):
            insort(self._ends, end)

    def remove(self, end: float, count: int) -> None:
        """They have, or go on no more: what was added, once."""
        first = bisect_left(self._ends, end)
        del self._ends[first : first + count]

    def steps_until(self, places: int, *, step: float, running: int, beginning: int, lifetime: float) -> float:
        """Steps from `step` on until so many places have come free.

        places      1 …; those that are taken again meanwhile come free anew
        running     sequences that hold a place, >= 1
        beginning   of these, those that have still to be given all their tokens
        lifetime    steps that a sequence is expected to run, > 0. Of those whose beginning was not seen, and of those that go on beyond
                    their expected end, the ends lie evenly within it
        """
        rounds, places = divmod(places - 1, running)
        places += 1
        ends = self._ends
        first = bisect_left(ends, step)
        rate = max(0, running - beginning - (len(ends) - first)) / lifetime  # of the ends that nothing is known of

        # The first expected end by which there have been enough; if there is none they are more than all that is expected.
        index = bisect_left(range(len(ends)), float(places), lo=first, key=lambda i: i + 1 - first + rate * (ends[i] - step))
        steps = (places - (index - first)) / rate if rate else math.inf
        if index < len(ends):
            steps = min(steps, ends[index] - step)
        if beginning:
            steps = min(steps, lifetime)
        return rounds * lifetime + steps
