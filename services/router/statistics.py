"""What a router counts for those who watch it: totals since its start, latencies of its last minute."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from protos.baton.v1 import status_pb2

WINDOW_S = 60.0
MAX_SAMPLES = 10_000
MAX_U64 = 2**64 - 1


class Latencies:
    """Durations of the last WINDOW_S seconds, at most MAX_SAMPLES of them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, seconds: float) -> None:
        self._samples.append((self._clock(), seconds))

    def summary(self) -> status_pb2.Summary:
        """Percentiles by nearest rank; zeros when there is no sample."""
        oldest = self._clock() - WINDOW_S
        while self._samples and self._samples[0][0] < oldest:
            self._samples.popleft()
        ordered = sorted(seconds for _, seconds in self._samples)
        return status_pb2.Summary(
            count=len(ordered), p50_s=_percentile(ordered, 50), p90_s=_percentile(ordered, 90), p99_s=_percentile(ordered, 99)
        )


class RouterStatistics:
    """Counters of one router; every accepted request ends in exactly one of finished, failed, cancelled."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_at = clock()
        self.accepted = self.finished = self.failed = self.cancelled = self.shed = 0
        self.prompt_tokens = self.cached_tokens = self.output_tokens = self.kv_bytes = 0
        self.ttft, self.tpot = Latencies(clock), Latencies(clock)

    @property
    def uptime_s(self) -> float:
        return self._clock() - self._started_at

    @property
    def in_flight(self) -> int:
        return self.accepted - self.finished - self.failed - self.cancelled

    def fill(self, message: status_pb2.WatchStatusResponse) -> None:
        """Writes all of it into a status message."""
        message.uptime_s = self.uptime_s
        message.in_flight = self.in_flight
        for name in (
            "accepted",
            "finished",
            "failed",
            "cancelled",
            "shed",
            "prompt_tokens",
            "cached_tokens",
            "output_tokens",
            "kv_bytes",
        ):
            # Some are sums of what workers say, which may be anything.
            setattr(message, name, min(getattr(self, name), MAX_U64))
        message.ttft.CopyFrom(self.ttft.summary())
        message.tpot.CopyFrom(self.tpot.summary())


def _percentile(ordered: Sequence[float], percent: int) -> float:
    if not ordered:
        return 0.0
    rank = -(-len(ordered) * percent // 100)
    return ordered[rank - 1]
