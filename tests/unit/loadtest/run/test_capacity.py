"""The search for a capacity, against servers whose capacity is known."""

import asyncio
from collections.abc import Callable

import pytest

from loadtest.result import CapacityFound
from loadtest.run.capacity import MOST_PROBES, RESOLUTION, SEEDS, Probe, search


def find(
    attainment: Callable[[float, int], float], *, first_rate: float = 1.0, stable_below: float = 1e9
) -> tuple[CapacityFound, list[Probe]]:
    async def probe(rate: float, seed: int) -> Probe:
        share = attainment(rate, seed)
        return Probe(
            rate=rate, seed=seed, offered=100, attainment=share, low=share, high=share, is_stable=rate < stable_below, is_valid=True
        )

    return asyncio.run(search(probe, first_rate=first_rate, goal=0.99))


@pytest.mark.parametrize("capacity", [0.3, 1.0, 7.3, 55.0])
def test_search_when_the_capacity_is_sharp_brackets_it(capacity: float) -> None:
    found, probes = find(lambda rate, _: 1.0 if rate <= capacity else 0.5)
    assert found.fails_at is not None
    assert found.rate <= capacity < found.fails_at <= found.rate * RESOLUTION
    assert len(probes) <= MOST_PROBES


def test_search_when_one_seed_fails_does_not_count_the_rate() -> None:
    found, probes = find(lambda rate, seed: 1.0 if rate <= (4.0 if seed == 2 else 8.0) else 0.5)
    assert found.rate <= 4.0
    assert sum(probe.rate == found.rate for probe in probes) >= SEEDS


def test_search_when_the_backlog_grows_counts_it_as_failed() -> None:
    found, _ = find(lambda rate, _: 1.0, stable_below=5.0)
    assert found.rate < 5.0 <= (found.fails_at or 0.0)


def test_search_when_nothing_passes_ends_with_zero() -> None:
    found, probes = find(lambda rate, _: 0.0)
    assert found.rate == 0.0 and len(probes) == MOST_PROBES


def test_search_when_everything_passes_ends_without_an_upper_end() -> None:
    found, _ = find(lambda rate, _: 1.0)
    assert found.fails_at is None and found.rate >= 2.0 ** (MOST_PROBES - 1)
