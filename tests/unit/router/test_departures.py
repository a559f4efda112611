"""When places come free: known ends one by one, all others evenly."""

from hypothesis import given
from hypothesis import strategies as st

from services.router.departures import Departures


def departures(*ends: float) -> Departures:
    known = Departures()
    for end in ends:
        known.add(end, 1)
    return known


def test_sequences_that_began_together_end_together() -> None:
    known = departures(*[32.0] * 8)
    waits = [known.steps_until(k, step=10, running=8, beginning=0, lifetime=32.0) for k in (1, 4, 8)]
    assert waits == [22.0, 22.0, 22.0]


def test_ends_that_differ_come_in_their_order() -> None:
    known = departures(40.0, 20.0, 30.0)
    assert [known.steps_until(k, step=10, running=3, beginning=0, lifetime=32.0) for k in (1, 2, 3)] == [10.0, 20.0, 30.0]


def test_places_that_were_taken_again_come_free_a_lifetime_later() -> None:
    known = departures(20.0, 30.0)
    assert [known.steps_until(k, step=10, running=2, beginning=0, lifetime=32.0) for k in (3, 4, 5)] == [42.0, 52.0, 74.0]


def test_those_of_which_nothing_is_known_end_evenly() -> None:
    waits = [departures().steps_until(k, step=7, running=4, beginning=0, lifetime=32.0) for k in (1, 2, 3, 4)]
    assert waits == [8.0, 16.0, 24.0, 32.0]


def test_those_beyond_their_expected_end_are_such() -> None:
    known = departures(5.0, 6.0, 40.0, 40.0)
    assert [known.steps_until(k, step=7, running=4, beginning=0, lifetime=32.0) for k in (1, 2, 3)] == [16.0, 32.0, 33.0]


def test_those_that_have_yet_to_begin_take_a_whole_lifetime() -> None:
    known = departures(20.0)
    assert [known.steps_until(k, step=10, running=4, beginning=3, lifetime=32.0) for k in (1, 2, 4)] == [10.0, 32.0, 32.0]


def test_known_and_unknown_ends_add_up() -> None:
    known = departures(12.0, 50.0)  # and two that end within 32 steps, one each 16
    assert [known.steps_until(k, step=10, running=4, beginning=0, lifetime=32.0) for k in (1, 2, 3)] == [2.0, 16.0, 32.0]


def test_what_was_removed_is_expected_no_more() -> None:
    known = departures(20.0, 20.0, 20.0, 30.0)
    known.remove(20.0, 2)
    assert len(known) == 2
    assert [known.steps_until(k, step=10, running=2, beginning=0, lifetime=32.0) for k in (1, 2)] == [10.0, 20.0]


@given(
    ends=st.lists(st.floats(0, 100), max_size=12),
    step=st.floats(0, 100),
    others=st.integers(0, 5),
    beginning=st.integers(0, 5),
    lifetime=st.floats(1, 200),
    places=st.integers(1, 12),
)
def test_steps_until_is_the_moment_at_which_enough_have_ended(
    ends: list[float], step: float, others: int, beginning: int, lifetime: float, places: int
) -> None:
    running = len(ends) + others + beginning
    if places > running:
        return
    steps = departures(*ends).steps_until(places, step=step, running=running, beginning=beginning, lifetime=lifetime)
    unknown = others + sum(end < step for end in ends)

    def ended(after: float) -> float:
        return sum(step <= end <= step + after for end in ends) + unknown * after / lifetime

    if beginning and ended(lifetime) < places:
        assert steps == lifetime
    else:
        assert ended(steps * (1 + 1e-9) + 1e-9) >= places - 1e-6
        assert ended(steps * (1 - 1e-6) - 1e-6) < places
