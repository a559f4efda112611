"""Two clocks: durations inside a process are taken on its monotonic one; what another process is to compare is stamped with wall time."""

import time


def unix_s(at: float) -> float:
    """The wall clock, in seconds of Unix time, at `at`: a time.perf_counter() of this process, not long ago."""
    return time.time() - (time.perf_counter() - at)
