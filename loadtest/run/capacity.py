"""The highest rate at which a target keeps its objective: doubled until it does not, then halved in between, each probe with its interval.

A probe passes when its attainment reaches the goal and its backlog does not grow: above capacity a run measures how long it lasted, not
how fast the target is. The last rates are tried with several seeds, and all must pass. Knows nothing of how a probe is made.
"""

from collections.abc import Awaitable, Callable

import msgspec

from loadtest.result import CapacityFound

RESOLUTION = 1.1  # highest good rate to lowest bad one
MOST_PROBES = 16
SEEDS = 3


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """
    rate               requests per second, offered
    attainment         good ÷ offered; low, high: its 95 % interval (Wilson)
    is_stable          the number of open requests did not grow over the run
    is_valid           the senders kept up
    """

    rate: float
    seed: int
    offered: int
    attainment: float
    low: float
    high: float
    is_stable: bool
    is_valid: bool

    def passes(self, goal: float) -> bool:
        return self.attainment >= goal and self.is_stable and self.is_valid


async def search(
    probe: Callable[[float, int], Awaitable[Probe]], *, first_rate: float, goal: float, resolution: float = RESOLUTION
) -> tuple[CapacityFound, list[Probe]]:
    """Asks `probe(rate, seed)` as often as it takes, MOST_PROBES times at most: an interval that wide is the answer then."""
    probes: list[Probe] = []
    passed: dict[float, int] = {}  # rate → seeds it passed with, of those that have not failed since
    bad = float("inf")

    async def ask(rate: float, num_seeds: int) -> bool:
        for seed in range(passed.get(rate, 0), num_seeds):
            if len(probes) == MOST_PROBES:
                return True  # as far as is known
            found = await probe(rate, seed)
            probes.append(found)
            if not found.passes(goal):
                passed.pop(rate, None)
                return False
            passed[rate] = seed + 1
        return True

    while len(probes) < MOST_PROBES:
        good = max((rate for rate in passed if rate < bad), default=0.0)
        if bad == float("inf"):
            rate, num_seeds = 2.0 * good or first_rate, 1
        elif not good:
            rate, num_seeds = bad / 2.0, 1
        elif passed[good] < SEEDS:
            rate, num_seeds = good, SEEDS  # on the way up one seed was enough
        elif bad > good * resolution:
            rate, num_seeds = (good * bad) ** 0.5, SEEDS
        else:
            break
        if not await ask(rate, num_seeds):
            bad = rate
    needed = 1 if bad == float("inf") else SEEDS
    good = max((rate for rate, num_seeds in passed.items() if rate < bad and num_seeds >= needed), default=0.0)
    return CapacityFound(rate=good, fails_at=None if bad == float("inf") else bad, goal=goal), probes
