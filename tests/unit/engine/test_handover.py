"""Sequences whose blocks others read or write: reserved for a peer to fill, or prefilled and held for one to copy."""

import hypothesis.strategies as st
import pytest
from hypothesis import event, given, settings

from services.engine.sequence import Purpose, Sequence
from tests.unit.engine.simulation import Answer, Arrival, Peer, Simulation, make_simulation, prompt, simulations

BUSY = 10**6  # ticks: a peer that does not answer while a test looks


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[Simulation, list[Arrival]]:
    """A small engine and requests that each fit its pool alone; few different tokens, so that prefixes meet."""
    block_size, num_blocks = draw(st.integers(1, 4)), draw(st.integers(2, 10))
    capacity = block_size * num_blocks
    stems = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=capacity), min_size=1, max_size=3))
    arrivals = []
    for _ in range(draw(st.integers(1, 8))):
        tokens = (draw(st.sampled_from(stems)) + draw(st.lists(st.integers(0, 2), max_size=6)))[: draw(st.integers(1, capacity - 1))]
        arrivals.append(
            Arrival(
                prompt=tuple(tokens),
                max_tokens=draw(st.integers(1, min(capacity - len(tokens), 16))),
                step=draw(st.integers(0, 20)),
                choices=draw(st.sampled_from([1, 1, 1, 3])),
                abort_after=draw(st.none() | st.none() | st.integers(0, 12)),
                purpose=draw(st.sampled_from(Purpose)),
                peer=Peer(
                    delay=draw(st.integers(0, 10)),
                    answer=draw(st.sampled_from(Answer)),
                    landed_tokens=draw(st.integers(0, len(tokens))),
                    fence_after=draw(st.integers(0, 10)),
                ),
            )
        )
    return draw(simulations(num_blocks, block_size)), arrivals


@settings(max_examples=400, deadline=None)
@given(scenarios())
def test_schedule_when_peers_read_and_write_blocks_then_nobody_reads_theirs_and_all_finish(
    scenario: tuple[Simulation, list[Arrival]],
) -> None:
    simulation, arrivals = scenario
    simulation.run(arrivals)
    event(f"preempted: {simulation.scheduler.num_preemptions > 0}")
    event(f"prefix hit: {simulation.scheduler.num_cached_tokens > 0}")
    event(f"waited for a peer: {simulation.steps < simulation.now}")


def receive(first: int, length: int, *, max_tokens: int = 1, delay: int = BUSY, choices: int = 1) -> Arrival:
    return Arrival(prompt=prompt(first, length), max_tokens=max_tokens, purpose=Purpose.RECEIVE, peer=Peer(delay=delay), choices=choices)


def make_prefill(first: int, length: int) -> Arrival:
    return Arrival(prompt=prompt(first, length), max_tokens=1, purpose=Purpose.PREFILL, peer=Peer(delay=BUSY))


def reserve(simulation: Simulation, arrival: Arrival, order: int) -> Sequence:
    """A request that is reserved at once."""
    sequence = simulation.add(arrival, order)
    simulation.step()
    assert simulation.scheduler.reserved == {str(order): sequence}
    return sequence


def test_schedule_when_a_request_is_reserved_takes_all_blocks_of_its_prompt_and_computes_nothing() -> None:
    simulation = make_simulation()
    sequence = simulation.add(receive(0, 9), 0)
    assert simulation.step() == []
    assert simulation.scheduler.admitted == [sequence]
    assert (len(sequence.tables[0].block_ids), sequence.num_computed, simulation.pool.num_owned) == (3, 0, 3)
    assert not simulation.scheduler.has_work
    assert simulation.step() == []
    assert simulation.scheduler.admitted == []


@pytest.mark.parametrize(("length", "cached"), [(8, 4), (9, 8), (12, 8)])
def test_schedule_when_a_reserved_prompt_is_cached_keeps_those_blocks_but_never_the_last(length: int, cached: int) -> None:
    simulation = make_simulation()
    simulation.run([Arrival(prompt=prompt(0, 12), max_tokens=1)])
    sequence = reserve(simulation, receive(0, length), 1)
    assert (sequence.num_computed, sequence.cached_tokens, sequence.num_sealed) == (cached, cached, cached // 4)


def test_schedule_when_reserved_ones_take_all_places_lets_nobody_in_until_one_has_ended() -> None:
    simulation = make_simulation(max_num_seqs=2)
    first, second = (simulation.add(receive(order, 2), order) for order in range(2))
    third = simulation.add(Arrival(prompt=prompt(2, 2), max_tokens=1), 2)
    assert simulation.step() == []
    assert list(simulation.scheduler.reserved.values()) == [first, second]
    assert (simulation.scheduler.waiting, simulation.scheduler.has_work) == ([third], False)
    simulation.answer("1")
    assert [chunk.sequence for chunk in simulation.step()] == [third]


def test_schedule_when_the_chunk_budget_is_spent_still_reserves() -> None:
    simulation = make_simulation(chunk_tokens=4)
    long = simulation.add(Arrival(prompt=prompt(0, 9), max_tokens=1), 0)
    reserved = simulation.add(receive(1, 2), 1)
    assert [chunk.sequence for chunk in simulation.step()] == [long]
    assert simulation.scheduler.admitted == [long, reserved]


def test_schedule_when_a_reservation_finds_no_room_lets_nobody_overtake() -> None:
    simulation = make_simulation(num_blocks=4)
    reserve(simulation, receive(0, 12), 0)
    big, small = simulation.add(receive(1, 8), 1), simulation.add(Arrival(prompt=prompt(2, 1), max_tokens=1), 2)
    assert simulation.step() == []
    assert simulation.scheduler.waiting == [big, small]


def test_schedule_when_reserved_ones_hold_all_blocks_preempts_the_only_runner_and_waits() -> None:
    simulation = make_simulation(num_blocks=4, block_size=2)
    runner = simulation.add(Arrival(prompt=prompt(0, 3), max_tokens=4), 0)
    simulation.step()
    reserve(simulation, receive(1, 3), 1)  # two blocks, and two for the runner, whose third it then lacks
    while runner in simulation.scheduler.running:
        simulation.step()
    assert (simulation.scheduler.waiting, simulation.scheduler.has_work) == ([runner], False)
    assert simulation.step() == []
    simulation.answer("1")
    while runner.order not in simulation.finished:
        assert simulation.step()


def test_schedule_when_a_block_is_needed_preempts_the_youngest_that_nobody_reads() -> None:
    simulation = make_simulation(num_blocks=10, block_size=2)
    old = simulation.add(Arrival(prompt=prompt(0, 3), max_tokens=6), 0)
    middle = simulation.add(Arrival(prompt=prompt(1, 3), max_tokens=6), 1)
    simulation.step()
    prefill = simulation.add(make_prefill(2, 12), 2)
    simulation.chunk_tokens = [1]
    while not simulation.scheduler.num_preemptions:
        simulation.step()
    assert simulation.scheduler.waiting == [middle]
    assert simulation.scheduler.running == [old, prefill]


def test_hold_when_a_prefill_is_computed_keeps_its_blocks_but_no_place() -> None:
    simulation = make_simulation(max_num_seqs=1)
    held = simulation.add(make_prefill(0, 9), 0)
    simulation.step()
    assert simulation.scheduler.held == {"0": held}
    assert (len(held.tables[0].block_ids), simulation.pool.num_owned) == (3, 3)
    following = simulation.add(make_prefill(1, 5), 1)
    assert [chunk.sequence for chunk in simulation.step()] == [following]
    simulation.let_go(held)
    assert (simulation.pool.num_owned, simulation.pool.num_cached) == (2, 2)  # its third block was filled in part


def test_start_when_all_has_landed_publishes_the_full_blocks_and_decodes_without_computing_the_prompt() -> None:
    simulation = make_simulation()
    sequence = reserve(simulation, receive(0, 10, max_tokens=3), 0)
    simulation.answer("0")
    assert (sequence.num_computed, sequence.num_sealed, sequence.purpose) == (10, 2, Purpose.GENERATE)
    assert simulation.pool.match_prefix(sequence.block_hashes) == sequence.tables[0].block_ids[:2]
    assert [(chunk.sequence, chunk.num_tokens) for chunk in simulation.step()] == [(sequence, 1)]


def test_start_when_a_part_has_landed_publishes_that_and_computes_the_rest() -> None:
    simulation = make_simulation()
    sequence = reserve(simulation, receive(0, 10), 0)
    simulation.write(sequence, 0, 4)
    simulation.scheduler.start("0", 4)
    assert simulation.pool.match_prefix(sequence.hash_full_blocks(4)) == sequence.tables[0].block_ids[:1]
    assert [(chunk.sequence, chunk.num_tokens) for chunk in simulation.step()] == [(sequence, 6)]


def test_start_when_younger_ones_run_already_takes_its_place_by_age() -> None:
    simulation = make_simulation()
    old = reserve(simulation, receive(0, 5, max_tokens=3), 0)
    young = simulation.add(Arrival(prompt=prompt(1, 5), max_tokens=5), 1)
    simulation.step()
    simulation.answer("0")
    assert simulation.scheduler.running == [old, young]


def test_start_when_there_are_choices_then_they_find_the_landed_prompt_in_the_cache() -> None:
    simulation = make_simulation(num_blocks=12)
    reserve(simulation, receive(0, 9, max_tokens=3, choices=3), 0)
    simulation.answer("0")
    chunks = simulation.step()
    assert [(chunk.sequence.choice, chunk.num_tokens) for chunk in chunks] == [(0, 1), (1, 2), (2, 2)]
    assert len({tuple(chunk.sequence.tables[0].block_ids[:2]) for chunk in chunks}) == 1


def test_quarantine_when_a_peer_may_still_write_takes_only_the_blocks_that_are_not_shared() -> None:
    simulation = make_simulation()
    simulation.run([Arrival(prompt=prompt(0, 8), max_tokens=1)])
    sequence = reserve(simulation, receive(0, 14), 1)
    following = simulation.add(Arrival(prompt=prompt(2, 1), max_tokens=1), 2)
    pool = simulation.pool
    assert (pool.num_owned, pool.num_quarantined) == (4, 0)
    simulation.scheduler.quarantine("1")
    assert (pool.num_owned, pool.num_quarantined, pool.num_cached) == (0, 2, 2)
    assert simulation.scheduler.waiting == [sequence, following]  # at its old place
    simulation.scheduler.schedule()
    assert sequence.purpose is Purpose.GENERATE
    assert sequence in simulation.scheduler.running
    assert (sequence.num_computed, sequence.cached_tokens, pool.num_quarantined) == (8, 8, 2)


def test_quarantine_when_the_request_is_dropped_leaves_it_nowhere() -> None:
    simulation = make_simulation()
    reserve(simulation, receive(0, 14), 0)
    simulation.scheduler.quarantine("0")
    simulation.scheduler.abort("0")
    assert not simulation.scheduler.waiting + simulation.scheduler.running
    assert (simulation.pool.num_owned, simulation.pool.num_quarantined) == (0, 4)


@pytest.mark.parametrize("arrival", [receive(0, 9), make_prefill(0, 9)])
def test_abort_when_a_request_is_reserved_or_held_frees_its_blocks(arrival: Arrival) -> None:
    simulation = make_simulation()
    sequence = simulation.add(arrival, 0)
    simulation.step()
    assert simulation.pool.num_owned == 3
    assert simulation.scheduler.abort("0") == [sequence]
    assert simulation.pool.num_owned == 0
    assert not simulation.scheduler.reserved
    assert not simulation.scheduler.held


def test_num_uncomputed_prompt_tokens_when_asked_for_counts_what_stands_between_here_and_first_tokens() -> None:
    simulation = make_simulation(num_blocks=30, max_num_seqs=4, chunk_tokens=8)
    scheduler = simulation.scheduler
    reserve(simulation, receive(0, 7), 0)
    assert scheduler.num_uncomputed_prompt_tokens == 0
    for order, arrival in enumerate(
        [Arrival(prompt=prompt(1, 5), max_tokens=9), make_prefill(2, 10), Arrival(prompt=prompt(3, 6), max_tokens=1), receive(4, 20)], 1
    ):
        simulation.add(arrival, order)
    assert scheduler.num_uncomputed_prompt_tokens == 5 + 10 + 6
    simulation.step()
    assert scheduler.num_uncomputed_prompt_tokens == 10 + 6 - 3
    simulation.step()
    assert scheduler.num_uncomputed_prompt_tokens == 6 - 1
