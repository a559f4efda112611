"""Links of the simulator: who gets how much of them, and that nothing is sent twice, lost, or faster than a link."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.sim.events import Events
from loadtest.sim.links import Links, Transfer


def _at(events: Events, time_s: float, transfer: Transfer, *parts: int) -> None:
    """Feeds parts at this time and closes."""

    def feed() -> None:
        for part in parts:
            transfer.feed(part)
        transfer.close()

    events.at(time_s, feed)


def test_transfer_alone_takes_its_bytes_at_the_link_s_rate() -> None:
    events, done = Events(), []
    links = Links(events, bytes_per_s=100.0)
    _at(events, 1.0, links.open("a", "b", on_done=lambda: done.append(events.now_s)), 30, 20)
    events.run()
    assert done == [pytest.approx(1.5)]
    assert links.sent_bytes == pytest.approx(50)


def test_transfers_that_share_a_receiver_get_half_each_until_one_is_done() -> None:
    events, done = Events(), []
    links = Links(events, bytes_per_s=100.0)
    for sender, num_bytes in (("a", 50), ("b", 100)):
        _at(events, 0.0, links.open(sender, "c", on_done=lambda: done.append(events.now_s)), num_bytes)
    _at(events, 0.0, links.open("c", "a", on_done=lambda: done.append(events.now_s)), 40)  # the other direction is free
    events.run()
    # 50 of each at 50 bytes/s until 1.0; the 50 left of the longer one at 100.
    assert done == pytest.approx([0.4, 1.0, 1.5])


def test_transfer_that_waits_for_its_next_part_leaves_the_link_to_others() -> None:
    events, done = Events(), []
    links = Links(events, bytes_per_s=100.0)
    slow = links.open("a", "c", on_done=lambda: done.append(("slow", events.now_s)))
    events.at(0.0, lambda: slow.feed(10))
    _at(events, 2.0, slow, 10)
    _at(events, 1.0, links.open("b", "c", on_done=lambda: done.append(("other", events.now_s))), 50)
    events.run()
    assert [name for name, _ in done] == ["other", "slow"]
    assert [at_s for _, at_s in done] == pytest.approx([1.5, 2.1])


def test_transfer_over_a_fast_link_late_in_a_run_survives_rounding() -> None:
    # A time of 3,600 s is known to 5e-13 s, in which 400 Gbit/s carry a fortieth of a byte.
    events, done = Events(), []
    links = Links(events, bytes_per_s=5e10)
    for index in range(50):
        _at(events, 3600.0 + index / 7, links.open("a", "b", on_done=lambda: done.append(events.now_s)), 67_108_864, 1)
    events.run()
    assert len(done) == 50
    assert links.sent_bytes == pytest.approx(50 * 67_108_865)


def test_transfer_without_bytes_is_done_when_it_is_closed() -> None:
    events, done = Events(), []
    _at(events, 3.0, Links(events, bytes_per_s=1.0).open("a", "b", on_done=lambda: done.append(events.now_s)))
    events.run()
    assert done == [3.0]


@given(
    st.lists(
        st.tuples(st.floats(0.0, 5.0), st.sampled_from("abc"), st.sampled_from("abcd"), st.lists(st.integers(1, 500), max_size=3)),
        max_size=12,
    )
)
def test_links_never_exceed_their_rate_and_everything_arrives(chosen: list[tuple[float, str, str, list[int]]]) -> None:
    events, num_done = Events(), 0
    links = Links(events, bytes_per_s=100.0)

    def done() -> None:
        nonlocal num_done
        num_done += 1

    for at_s, sender, receiver, parts in chosen:
        transfer = links.open(sender, receiver, on_done=done)
        for index, part in enumerate(parts):
            events.at(at_s + index, lambda transfer=transfer, part=part: transfer.feed(part))  # type: ignore[misc]
        _at(events, at_s + len(parts), transfer)
    for step in range(200):
        events.at(0.1 * step, lambda: _check(links))
    events.run()
    assert num_done == len(chosen)
    assert links.sent_bytes == pytest.approx(sum(sum(parts) for _, _, _, parts in chosen))
    assert not any(links.rates().values())


def _check(links: Links) -> None:
    assert all(0.0 <= rate <= links.bytes_per_s * (1 + 1e-9) for rate in links.rates().values())
