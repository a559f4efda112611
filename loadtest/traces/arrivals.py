"""When requests come: seeded arrival processes, and other times for a workload that has its own.

The gaps between arrivals are drawn as `vllm bench serve` draws them: from a Gamma distribution whose shape is the burstiness and whose mean
is 1 / rate. A burstiness of 1 is a Poisson process, less comes in bursts (the gaps' coefficient of variation is its square root's
inverse), more is steadier.
"""

import enum
from collections.abc import Sequence

import numpy as np

from loadtest.files import BadInput
from loadtest.schedule import Schedule


class Arrivals(enum.StrEnum):
    POISSON = "poisson"
    GAMMA = "gamma"
    TRACE = "trace"


class Stream(enum.IntEnum):
    """One stream of random numbers for each thing that is drawn, so that more of one does not change the others."""

    ARRIVALS = 0
    SESSIONS = 1
    CONVERSATIONS = 2
    LENGTHS = 3
    THINKING = 4
    TENANTS = 5


def generator(seed: int, stream: Stream) -> np.random.Generator:
    """Equal for equal arguments, in every process. NumPy may change what it draws between versions: a schedule is kept as a file."""
    return np.random.default_rng([seed, stream])


def arrival_times(count: int, *, rate: float, burstiness: float = 1.0, seed: int, stream: Stream = Stream.ARRIVALS) -> Sequence[float]:
    """So many times in seconds, ascending, the first after one gap.

    rate   arrivals a second
    """
    gaps = generator(seed, stream).gamma(burstiness, 1.0 / (rate * burstiness), count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def restamped(schedule: Schedule, arrivals: Arrivals, *, rate: float | None = None, burstiness: float = 1.0, seed: int) -> Schedule:
    """The same requests in the same order at other times; of a session its first turn, the others follow it as before.

    rate   arrivals a second; as many as they were when not given. The recorded arrivals are only pulled or pushed together to reach it.
    Raises BadInput when there is no rate, and none to be taken from the times.
    """
    recorded = [request.at_s for request in schedule.requests if request.after is None]
    if len(recorded) < 2 or recorded[-1] <= recorded[0]:
        if rate is None or arrivals is Arrivals.TRACE:
            raise BadInput(f"{schedule.source}: all requests come at the same time, which has no rate (--rate, --arrivals poisson)")
        own_rate = rate
    else:
        own_rate = (len(recorded) - 1) / (recorded[-1] - recorded[0])
    rate = rate or own_rate
    if arrivals is Arrivals.TRACE:
        factor = own_rate / rate
        return schedule.with_times([time * factor for time in recorded], f"recorded arrivals at {rate:.4g}/s")
    times = arrival_times(len(recorded), rate=rate, burstiness=burstiness, seed=seed)
    kind = "Poisson" if burstiness == 1.0 else f"Gamma (burstiness {burstiness:g})"
    return schedule.with_times(times, f"{kind} arrivals at {rate:.4g}/s, seed {seed}")
