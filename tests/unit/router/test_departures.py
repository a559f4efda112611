"""When places come free: known ends one by one, all others evenly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.departures import Departures


def departures(*ends: float) -> Departures:
    known = Departures()
    for end in ends:
        known.add(end, 1)
    return known


def waits(known: Departures, *places: int, step: float = 10, beginning: int = 0, running: int) -> list[float]:
    return [known.steps_until(count, step=step, running=running, beginning=beginning, lifetime=32.0) for count in places]


def test_sequences_that_began_together_end_together() -> None:
    assert waits(departures(*[32.0] * 8), 1, 4, 8, running=8) == [22.0, 22.0, 22.0]


def test_ends_that_differ_come_in_their_order() -> None:
    assert waits(departures(40.0, 20.0, 30.0), 1, 2, 3, running=3) == [10.0, 20.0, 30.0]


def test_places_that_were_taken_again_come_free_a_lifetime_later() -> None:
    assert waits(departures(20.0, 30.0), 3, 4, 5, running=2) == [42.0, 52.0, 74.0]


def test_those_of_which_nothing_is_known_end_evenly() -> None:
    assert waits(departures(), 1, 2, 3, 4, running=4) == [8.0, 16.0, 24.0, 32.0]


def test_those_a_little_beyond_their_expected_end_are_about_to_end() -> None:
    assert waits(departures(*[32.0] * 8), 1, 8, step=33, running=8) == [1.0, 1.0]


def test_those_far_beyond_their_expected_end_go_on_as_long_as_they_have_but_no_longer_than_a_sequence_takes() -> None:
    assert waits(departures(1.0, 5.0, 40.0), 1, 2, 3, step=25, running=3) == [15.0, 20.0, 24.0]
    assert waits(departures(1.0), 1, step=1e6, running=1) == [32.0]
    assert waits(departures(1e6), 1, step=1, running=1) == [32.0]


def test_those_that_have_yet_to_begin_take_a_whole_lifetime() -> None:
    assert waits(departures(20.0), 1, 2, 4, running=4, beginning=3) == [10.0, 32.0, 32.0]


def test_known_and_unknown_ends_add_up() -> None:
    # Beside the known ones two that end within 32 steps, one each 16.
    assert waits(departures(12.0, 40.0), 1, 2, 3, 4, running=4) == [2.0, 16.0, 30.0, 32.0]


def test_what_was_removed_is_expected_no_more() -> None:
    known = departures(20.0, 20.0, 20.0, 30.0)
    known.remove(20.0, 2)
    assert len(known) == 2
    assert waits(known, 1, 2, running=2) == [10.0, 20.0]


@given(
    ends=st.lists(st.floats(0, 100), max_size=12),
    step=st.floats(0, 100),
    unknown=st.integers(0, 5),
    beginning=st.integers(0, 5),
    lifetime=st.floats(1, 200),
    places=st.integers(1, 20),
)
def test_steps_until_is_the_moment_at_which_enough_have_ended(
    ends: list[float], step: float, unknown: int, beginning: int, lifetime: float, places: int
) -> None:
    running = len(ends) + unknown + beginning
    if places > running:
        return
    steps = departures(*ends).steps_until(places, step=step, running=running, beginning=beginning, lifetime=lifetime)

    def ended(after: float) -> float:
        return sum(abs(end - step) <= after for end in ends) + unknown * after / lifetime

    if ended(lifetime) < places:
        assert steps == pytest.approx(lifetime)
    else:
        assert ended(steps * (1 + 1e-9) + 1e-9) >= places - 1e-6
        assert ended(steps * (1 - 1e-6) - 1e-6) < places
