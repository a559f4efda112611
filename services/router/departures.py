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
        lifetime    steps that a sequence is expected to run, > 0. Of those whose beginning was not seen the ends lie evenly within it

        A sequence that is beyond its expected end is taken to go on for as long as it has been: the end was missed by a step or two, or
        little is known of it.
        """
        rounds, places = divmod(places - 1, running)
        rate = max(0, running - beginning - len(self._ends)) / lifetime  # of the ends that nothing is known of
        return rounds * lifetime + min(lifetime, self._steps_until(places + 1, step, rate))

    def _steps_until(self, places: int, step: float, rate: float) -> float:
        ends = self._ends
        after = bisect_left(ends, step)
        before, num_ended = after - 1, 0
        while True:
            # The next to end, of those before and after their expected end.
            overdue = step - ends[before] if before >= 0 else math.inf
            due = ends[after] - step if after < len(ends) else math.inf
            steps = min(overdue, due)
            if num_ended + rate * steps >= places or steps == math.inf:
                return (places - num_ended) / rate if rate else math.inf
            num_ended += 1
            if num_ended + rate * steps >= places:
                return steps
            before, after = (before - 1, after) if overdue < due else (before, after + 1)
