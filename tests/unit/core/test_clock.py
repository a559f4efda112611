"""The wall clock at a moment of the monotonic one."""

import time

from services.core.clock import unix_s


def test_unix_s_when_a_moment_is_past_is_the_wall_clock_of_then() -> None:
    """A process that is stopped for milliseconds between two looks at a clock would fail it: once in 100,000 runs or so."""
    before_s, at, after_s = time.time(), time.perf_counter(), time.time()
    time.sleep(0.01)
    assert before_s - 1e-3 <= unix_s(at) <= after_s + 1e-3
    assert abs(unix_s(at) - unix_s(at - 60.0) - 60.0) < 1e-3
