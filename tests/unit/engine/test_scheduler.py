"""The scheduler under simulated requests: who is served, who waits, whose blocks are taken back, and that each reads its own cells."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import event, given, settings

from tests.unit.engine.simulation import Arrival, Simulation, prompt, simulations
from tests.unit.engine.simulation import make_simulation as make


@st.composite
def scenarios(draw: st.DrawFn, *, most_choices: int) -> tuple[Simulation, list[Arrival]]:
    """A small engine and requests that each fit its pool alone; few different tokens, so that prefixes meet."""
    block_size, num_blocks = draw(st.integers(1, 4)), draw(st.integers(1, 10))
    capacity = block_size * num_blocks
    if capacity < 2:
        num_blocks, capacity = 2, 2 * block_size
    stems = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=capacity), min_size=1, max_size=3))
    arrivals = []
    for _ in range(draw(st.integers(1, 8))):
        stem = draw(st.sampled_from(stems))
        prompt = (stem + draw(st.lists(st.integers(0, 2), max_size=6)))[: draw(st.integers(1, capacity - 1))]
        arrivals.append(
            Arrival(
                prompt=tuple(prompt),
                max_tokens=draw(st.integers(1, min(capacity - len(prompt), 16))),
                step=draw(st.integers(0, 20)),
                choices=draw(st.integers(1, most_choices)),
                abort_after=draw(st.none() | st.none() | st.integers(0, 12)),
                tenant=draw(st.sampled_from([0, 0, 0, 1])),
            )
        )
    return draw(simulations(num_blocks, block_size)), arrivals


@settings(max_examples=250, deadline=None)
@given(scenarios(most_choices=1))
def test_schedule_when_requests_come_and_go_then_the_oldest_always_advances_and_all_finish(
    scenario: tuple[Simulation, list[Arrival]],
) -> None:
    simulation, arrivals = scenario
    simulation.run(arrivals)
    event(f"preempted: {simulation.scheduler.num_preemptions > 0}")
    event(f"prefix hit: {simulation.scheduler.num_cached_tokens > 0}")
    event(f"windows: {simulation.groups.windows}")


@settings(max_examples=150, deadline=None)
@given(scenarios(most_choices=4))
def test_schedule_when_requests_have_several_choices_then_all_of_them_finish(scenario: tuple[Simulation, list[Arrival]]) -> None:
    simulation, arrivals = scenario
    simulation.run(arrivals)
    event(f"preempted: {simulation.scheduler.num_preemptions > 0}")


@pytest.mark.parametrize("num_requests", [2, 3, 6])
def test_schedule_when_the_pool_is_too_small_for_all_preempts_the_youngest_and_all_finish(num_requests: int) -> None:
    simulation = make(num_blocks=5, block_size=2, max_num_seqs=6)
    simulation.run([Arrival(prompt=prompt(index, 2), max_tokens=8) for index in range(num_requests)])
    assert simulation.scheduler.num_preemptions > 0
    assert simulation.finished == sorted(simulation.finished)


def test_schedule_when_a_sequence_is_preempted_then_it_keeps_its_tokens_and_its_place() -> None:
    simulation = make(num_blocks=4, block_size=2)
    old, young = (simulation.add(Arrival(prompt=prompt(index, 3), max_tokens=5), index) for index in range(2))
    simulation.step()
    late = simulation.add(Arrival(prompt=prompt(2, 1), max_tokens=1), 2)
    while not simulation.scheduler.num_preemptions:
        num_tokens = len(young.tokens)
        chunks = simulation.step()
    assert [chunk.sequence for chunk in chunks] == [old]
    assert simulation.scheduler.waiting == [young, late]
    assert len(young.tokens) == num_tokens
    assert (young.tables, young.num_computed) == ([], 0)


def test_schedule_when_the_youngest_itself_finds_no_block_preempts_itself() -> None:
    simulation = make(num_blocks=3, block_size=2, max_num_seqs=2)
    old = simulation.add(Arrival(prompt=prompt(0, 3), max_tokens=1), 0)
    young = simulation.add(Arrival(prompt=prompt(1, 2), max_tokens=4), 1)
    old.max_tokens = 2
    simulation.step()
    assert simulation.pool.num_available == 0
    chunks = simulation.step()  # old has room for its fourth token, young needs a second block
    assert [chunk.sequence for chunk in chunks] == [old]
    assert simulation.scheduler.waiting == [young]


def test_schedule_when_a_long_prompt_waits_for_blocks_then_a_short_one_behind_it_does_not_overtake() -> None:
    simulation = make(num_blocks=4, block_size=2)
    running = simulation.add(Arrival(prompt=prompt(0, 3), max_tokens=4), 0)
    simulation.step()
    long = simulation.add(Arrival(prompt=prompt(1, 7), max_tokens=1), 1)
    short = simulation.add(Arrival(prompt=prompt(2, 1), max_tokens=1), 2)
    while running.order not in simulation.finished:
        assert [chunk.sequence for chunk in simulation.step()] == [running]
        if running in simulation.scheduler.running:
            assert simulation.scheduler.waiting == [long, short]
    assert simulation.step()[0].sequence is long


def test_schedule_when_a_prompt_is_longer_than_the_budget_cuts_it_evenly_and_the_rest_of_the_budget_goes_to_the_next() -> None:
    simulation = make(num_blocks=16, chunk_tokens=10)
    first = simulation.add(Arrival(prompt=prompt(0, 25), max_tokens=2), 0)
    second = simulation.add(Arrival(prompt=prompt(1, 12), max_tokens=2), 1)
    steps = [[(chunk.sequence, chunk.num_tokens) for chunk in simulation.step()] for _ in range(4)]
    assert steps == [[(second, 1), (first, 9)], [(first, 8), (second, 2)], [(first, 8), (second, 2)], [(first, 1), (second, 7)]]


@pytest.mark.parametrize(("num_tokens", "expected"), [(10, [10]), (11, [6, 5]), (30, [10, 10, 10]), (31, [8, 8, 8, 7])])
def test_schedule_when_a_prompt_is_alone_takes_no_more_steps_than_it_needs(num_tokens: int, expected: list[int]) -> None:
    simulation = make(num_blocks=16, chunk_tokens=10)
    sequence = simulation.add(Arrival(prompt=prompt(0, num_tokens), max_tokens=1), 0)
    assert [[(chunk.sequence, chunk.num_tokens) for chunk in simulation.step()] for _ in expected] == [[(sequence, n)] for n in expected]


def test_schedule_when_the_last_chunk_of_a_prompt_is_one_token_puts_it_among_the_decodes() -> None:
    simulation = make(num_blocks=16, chunk_tokens=5)
    first = simulation.add(Arrival(prompt=prompt(0, 9), max_tokens=2), 0)
    second = simulation.add(Arrival(prompt=prompt(1, 1), max_tokens=2), 1)
    simulation.step()
    assert [(chunk.sequence, chunk.num_tokens) for chunk in simulation.step()] == [(second, 1), (first, 4)]


def test_schedule_when_a_prompt_is_cached_computes_only_what_is_not_and_at_least_one_token() -> None:
    simulation = make()
    simulation.run([Arrival(prompt=prompt(0, 12), max_tokens=1)])
    for length, expected in [(12, 8), (14, 12), (7, 4), (4, 0), (3, 0)]:
        sequence = simulation.add(Arrival(prompt=prompt(0, length), max_tokens=1), length)
        chunks = simulation.step()
        assert (sequence.cached_tokens, chunks[0].num_tokens) == (expected, length - expected)
    assert simulation.scheduler.num_cached_tokens == 8 + 12 + 4


def test_schedule_when_another_tenant_sends_the_same_prompt_shares_nothing() -> None:
    simulation = make()
    simulation.run([Arrival(prompt=prompt(0, 12), max_tokens=1)])
    sequence = simulation.add(Arrival(prompt=prompt(0, 12), max_tokens=1, tenant=1), 1)
    simulation.step()
    assert sequence.cached_tokens == 0


def test_schedule_when_a_preempted_sequence_returns_finds_its_blocks_and_reports_the_first_hit_only() -> None:
    simulation = make(num_blocks=5, block_size=2)
    simulation.add(Arrival(prompt=prompt(0, 3), max_tokens=3), 0)
    young = simulation.add(Arrival(prompt=prompt(1, 5), max_tokens=5), 1)
    while not simulation.scheduler.num_preemptions:
        simulation.step()
    while young in simulation.scheduler.waiting:
        simulation.step()
    assert simulation.scheduler.num_cached_tokens > 0
    assert young.cached_tokens == 0


def test_schedule_when_several_choices_start_then_they_share_the_full_blocks_of_the_prompt() -> None:
    simulation = make(num_blocks=12)
    simulation.add(Arrival(prompt=prompt(0, 10), max_tokens=6, choices=3), 0)
    simulation.step()
    simulation.step()
    tables = [sequence.tables[0].block_ids for sequence in simulation.scheduler.running]
    assert len(tables) == 3
    assert Counter(block_id for table in tables for block_id in table) == {
        **dict.fromkeys(tables[0][:2], 3),
        **dict.fromkeys([table[2] for table in tables], 1),
    }


def test_schedule_when_nothing_is_there_is_empty() -> None:
    simulation = make()
    assert simulation.scheduler.schedule() == []
    assert not simulation.scheduler.has_work


def test_abort_when_the_request_is_unknown_drops_nothing() -> None:
    simulation = make()
    simulation.add(Arrival(prompt=prompt(0, 3), max_tokens=3), 0)
    assert simulation.scheduler.abort("no such request") == []
    assert len(simulation.scheduler.waiting) == 1


def test_abort_when_a_request_is_half_way_through_its_prompt_frees_all_its_blocks() -> None:
    simulation = make(num_blocks=16, chunk_tokens=4)
    simulation.add(Arrival(prompt=prompt(0, 20), max_tokens=3), 0)
    simulation.step()
    simulation.abort("0")
    assert simulation.pool.num_owned == 0
    assert simulation.pool.num_cached == 1  # the computed block stays for whoever sends that prompt again


def test_abort_when_a_request_has_several_choices_drops_waiting_and_running_ones() -> None:
    simulation = make(max_num_seqs=2)
    simulation.add(Arrival(prompt=prompt(0, 3), max_tokens=9, choices=4), 0)
    simulation.step()
    simulation.step()
    assert (len(simulation.scheduler.running), len(simulation.scheduler.waiting)) == (2, 2)
    simulation.abort("0")
    assert not simulation.scheduler.has_work
    assert simulation.pool.num_owned == 0
