"""The highest rate at which a target keeps its objective: doubled until it does not, then halved in between, each probe with its interval.

A probe passes when its attainment reaches the goal and its backlog does not grow: above capacity a run measures how long it lasted, not
how fast the target is. The last rates are tried with several seeds, and all must pass. Knows nothing of how a probe is made.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """
    rate      the highest that passed with every seed; 0: none did
    fails_at  the lowest above it that failed; None: none did
    """

    rate: float
    fails_at: float | None
    goal: float
    probes: tuple[Probe, ...]


async def search(
    probe: Callable[[float, int], Awaitable[Probe]], *, first_rate: float, goal: float, resolution: float = RESOLUTION
) -> Capacity:
    """Asks `probe(rate, seed)` as often as it takes, MOST_PROBES times at most."""
    probes: list[Probe] = []
    good, bad = 0.0, float("inf")
    rate = first_rate
    while len(probes) < MOST_PROBES:
        is_close = bad < float("inf") and bad <= good * resolution
        if is_close:
            break
        if await _passes(probe, rate, goal, probes, num_seeds=1 if bad == float("inf") else SEEDS):
            good = rate
        else:
            bad = rate
        if bad == float("inf"):
            rate = 2.0 * good
        elif not good:
            rate = bad / 2.0
        else:
            rate = (good * bad) ** 0.5
    # What passed with one seed on the way up has to pass with all of them.
    num_seeds_at_good = sum(1 for one in probes if one.rate == good)
    if good and num_seeds_at_good < SEEDS and not await _passes(probe, good, goal, probes, num_seeds=SEEDS, first_seed=num_seeds_at_good):
        passed = [one.rate for one in probes if one.rate < good and one.passes(goal)]
        bad, good = good, max(passed, default=0.0)
    return Capacity(rate=good, fails_at=None if bad == float("inf") else bad, goal=goal, probes=tuple(probes))


async def _passes(
    probe: Callable[[float, int], Awaitable[Probe]],
    rate: float,
    goal: float,
    probes: list[Probe],
    *,
    num_seeds: int,
    first_seed: int = 0,
) -> bool:
    """Whether all seeds pass; the first one that does not is enough to know."""
    for seed in range(first_seed, num_seeds):
        found = await probe(rate, seed)
        probes.append(found)
        if not found.passes(goal):
            return False
    return True
