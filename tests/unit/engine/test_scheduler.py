"""Scheduler without a model: tokens are made up, but every cell of the KV cache is followed, so that a mixed-up block shows.

The simulation writes into each cell what a model would: a number that stands for the token and all tokens before it. A sequence whose
blocks hold anything else would read another's keys and values.
"""

from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import event, given, settings

from services.core.types import SamplingParams
from services.engine.block_pool import BlockPool
from services.engine.scheduler import ScheduledChunk, Scheduler
from services.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request of the simulation; it comes at `step` and is aborted `abort_after` steps later if it still runs."""

    prompt: tuple[int, ...]
    max_tokens: int
    step: int = 0
    choices: int = 1
    abort_after: int | None = None
    tenant: int = 0

    @property
    def total_tokens(self) -> int:
        return len(self.prompt) + self.max_tokens


class Simulation:
    """A scheduler, its pool, and cells that remember what was written into them."""

    def __init__(self, *, num_blocks: int, block_size: int, max_num_seqs: int, chunk_tokens: list[int]) -> None:
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.pool, block_size=block_size, max_num_seqs=max_num_seqs, prefill_chunk_tokens=chunk_tokens[0])
        self.chunk_tokens = chunk_tokens
        self.cells: dict[int, int] = {}
        self.finished: list[tuple[int, int]] = []
        self.has_choices = False
        self.steps = 0
        self._histories: dict[tuple[int, int], int] = {}  # (history before, token) → history

    def add(self, arrival: Arrival, order: int) -> Sequence:
        sequence = Sequence(
            request_id=str(order),
            choice=0,
            order=(order, 0),
            tokens=list(arrival.prompt),
            prompt_length=len(arrival.prompt),
            max_tokens=arrival.max_tokens,
            sampling=SamplingParams(n=arrival.choices),
            seed=0,
            stop_ids=frozenset(),
            prefix_key=b"tenant %d" % arrival.tenant,
        )
        self.has_choices |= arrival.choices > 1
        self.scheduler.add(sequence)
        return sequence

    def run(self, arrivals: list[Arrival]) -> None:
        """Everything, to the end, with checks at each step; no sequence may take longer than `bound` allows all of them."""
        pending = sorted(arrivals, key=lambda arrival: arrival.step)
        aborts: list[tuple[int, str]] = []
        order, now = 0, 0
        while pending or self.scheduler.has_work:
            while pending and pending[0].step <= now:
                arrival = pending.pop(0)
                self.add(arrival, order)
                if arrival.abort_after is not None:
                    aborts.append((now + arrival.abort_after, str(order)))
                order += 1
            for request_id in [request_id for at, request_id in aborts if at == now]:
                self.abort(request_id)
            if self.scheduler.has_work:
                self.step()
            now += 1
            assert self.steps <= self.bound(arrivals)
        assert self.scheduler.schedule() == []
        assert self.pool.num_owned == 0
        for index, arrival in enumerate(sorted(arrivals, key=lambda arrival: arrival.step)):
            if arrival.abort_after is None:
                assert {(index, choice) for choice in range(arrival.choices)} <= set(self.finished)
        assert len(self.finished) == len(set(self.finished))

    def bound(self, arrivals: list[Arrival]) -> int:
        """Steps that suffice for all sequences one after another.

        The oldest running sequence advances in every step and, without further choices, never loses what it has. A further choice joins
        ahead of younger running requests and may once cost the oldest of these its blocks.
        """
        chunk = min(self.chunk_tokens)
        prefills = [-(-arrival.total_tokens // chunk) for arrival in arrivals]
        alone = sum(arrival.choices * (prefill + arrival.max_tokens) for arrival, prefill in zip(arrivals, prefills, strict=True))
        return alone + sum(arrival.choices - 1 for arrival in arrivals) * max(prefills)

    def abort(self, request_id: str) -> None:
        before = [sequence for sequence in self.scheduler.running + self.scheduler.waiting if sequence.request_id == request_id]
        dropped = self.scheduler.abort(request_id)
        assert sorted(map(id, dropped)) == sorted(map(id, before))
        assert all(not sequence.block_ids for sequence in dropped)
        assert all(sequence.request_id != request_id for sequence in self.scheduler.running + self.scheduler.waiting)
        self.check_blocks()

    def step(self) -> list[ScheduledChunk]:
        scheduler = self.scheduler
        scheduler.prefill_chunk_tokens = self.chunk_tokens[self.steps % len(self.chunk_tokens)]
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        decoding = [sequence for sequence in running if sequence.num_uncomputed == 1]
        chunks = scheduler.schedule()
        self.check_order(running, waiting, decoding, chunks)
        self.check_chunks(decoding, chunks)
        self.check_blocks()
        self.compute(chunks)
        self.check_blocks()
        self.check_cells()
        for chunk in chunks:
            self.sample(chunk.sequence)
        self.steps += 1
        return chunks

    def compute(self, chunks: list[ScheduledChunk]) -> None:
        """What the model does, then what the engine core tells the scheduler."""
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.num_computed
            for position in range(start, start + chunk.num_tokens):
                self.cells[self.cell(sequence, position)] = self.histories(sequence)[position]
        for chunk in chunks:
            self.scheduler.computed(chunk)

    def sample(self, sequence: Sequence) -> None:
        """Adds a made-up token once all tokens are computed; the first one brings the further choices."""
        if sequence.num_uncomputed:
            return
        group = [sequence]
        if sequence.choice == 0 and sequence.num_output_tokens == 0:
            for choice in range(1, sequence.sampling.n):
                sibling = Sequence(
                    request_id=sequence.request_id,
                    choice=choice,
                    order=(sequence.order[0], choice),
                    tokens=list(sequence.tokens),
                    prompt_length=sequence.prompt_length,
                    max_tokens=sequence.max_tokens,
                    sampling=sequence.sampling,
                    seed=choice,
                    stop_ids=frozenset(),
                    prefix_key=sequence.prefix_key,
                )
                group.append(sibling)
        for member in group:
            member.tokens.append((member.order[0] + 2 * member.choice + len(member.tokens) ** 2) % 3)
            if member.num_output_tokens < member.max_tokens:
                if member is not sequence:
                    self.scheduler.add(member)
                continue
            self.finished.append(member.order)
            if member is sequence:
                self.scheduler.finish(member)

    def histories(self, sequence: Sequence) -> list[int]:
        """For each position a number that stands for the tokens up to it, under the sequence's key."""
        history, result = -1 - int(sequence.prefix_key[-1:]), []
        for token in sequence.tokens:
            history = self._histories.setdefault((history, token), len(self._histories))
            result.append(history)
        return result

    def cell(self, sequence: Sequence, position: int) -> int:
        size = self.scheduler.block_size
        return sequence.block_ids[position // size] * size + position % size

    def check_order(self, running: list[Sequence], waiting: list[Sequence], decoding: list[Sequence], chunks: list[ScheduledChunk]) -> None:
        """Who may go first; `running`, `waiting` and `decoding` are from before schedule()."""
        scheduler = self.scheduler
        assert scheduler.running == sorted(scheduler.running, key=lambda sequence: sequence.order)
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda sequence: sequence.order)
        assert sorted(map(id, running + waiting)) == sorted(map(id, scheduler.running + scheduler.waiting))
        assert len(scheduler.running) <= scheduler.max_num_seqs
        served = [chunk.sequence for chunk in chunks]
        oldest = running[0] if running else waiting[0]
        assert oldest in served
        if not self.has_choices:
            assert oldest is min(running + waiting, key=lambda sequence: sequence.order)
            orders = [sequence.order for sequence in scheduler.running + scheduler.waiting]
            assert orders == sorted(orders)  # everyone who runs came before everyone who waits
        preempted = [sequence for sequence in running if sequence not in scheduler.running]
        admitted = [sequence for sequence in scheduler.running if sequence not in running]
        assert admitted == waiting[: len(admitted)]  # nobody overtakes
        assert not (preempted and admitted)
        assert all(kept.order < lost.order for kept in scheduler.running for lost in preempted)
        assert all(sequence in served for sequence in decoding if sequence not in preempted)
        budget_left = scheduler.prefill_chunk_tokens - sum(chunk.num_tokens for chunk in chunks if chunk.sequence not in decoding)
        if scheduler.waiting and not preempted and len(scheduler.running) < scheduler.max_num_seqs and budget_left:
            assert self.pool.num_available < -(-len(scheduler.waiting[0].tokens) // scheduler.block_size)  # no room is left idle

    def check_chunks(self, decoding: list[Sequence], chunks: list[ScheduledChunk]) -> None:
        sizes = [chunk.num_tokens for chunk in chunks]
        assert sizes[: sizes.count(1)] == [1] * sizes.count(1)  # decodes first
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        prefills = [chunk for chunk in chunks if chunk.sequence not in decoding]
        assert sum(chunk.num_tokens for chunk in prefills) <= self.scheduler.prefill_chunk_tokens
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence in self.scheduler.running
            assert 1 <= chunk.num_tokens <= sequence.num_uncomputed
            assert sequence.num_computed + chunk.num_tokens <= len(sequence.block_ids) * self.scheduler.block_size

    def check_blocks(self) -> None:
        """The pool's balance, and that a block in two tables has one content."""
        pool, size = self.pool, self.scheduler.block_size
        assert pool.num_free + pool.num_cached + pool.num_owned + pool.num_quarantined == pool.num_blocks
        for sequence in self.scheduler.waiting:
            assert (sequence.block_ids, sequence.num_computed, sequence.num_sealed) == ([], 0, 0)
        users: dict[int, set[tuple[int, int]]] = {}
        for sequence in self.scheduler.running:
            assert len(set(sequence.block_ids)) == len(sequence.block_ids) <= -(-len(sequence.tokens) // size)
            histories = self.histories(sequence)
            for index, block_id in enumerate(sequence.block_ids):
                end = (index + 1) * size
                # What the block is to hold: its content once computed, else a mark that nobody else has.
                holds = (histories[end - 1], index) if end <= sequence.num_computed else (-id(sequence), index)
                users.setdefault(block_id, set()).add(holds)
        assert all(len(contents) == 1 for contents in users.values())
        assert len(users) == pool.num_owned

    def check_cells(self) -> None:
        """Every computed token of every sequence has its own keys and values behind it."""
        for sequence in self.scheduler.running:
            histories = self.histories(sequence)
            written = [self.cells[self.cell(sequence, position)] for position in range(sequence.num_computed)]
            assert written == histories[: sequence.num_computed]


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
    simulation = Simulation(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=draw(st.integers(1, 5)),
        chunk_tokens=draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)),
    )
    return simulation, arrivals


@settings(max_examples=250, deadline=None)
@given(scenarios(most_choices=1))
def test_schedule_when_requests_come_and_go_then_the_oldest_always_advances_and_all_finish(
    scenario: tuple[Simulation, list[Arrival]],
) -> None:
    simulation, arrivals = scenario
    simulation.run(arrivals)
    event(f"preempted: {simulation.scheduler.num_preemptions > 0}")
    event(f"prefix hit: {simulation.scheduler.num_cached_tokens > 0}")


@settings(max_examples=150, deadline=None)
@given(scenarios(most_choices=4))
def test_schedule_when_requests_have_several_choices_then_all_of_them_finish(scenario: tuple[Simulation, list[Arrival]]) -> None:
    simulation, arrivals = scenario
    simulation.run(arrivals)
    event(f"preempted: {simulation.scheduler.num_preemptions > 0}")


def prompt(first: int, length: int) -> tuple[int, ...]:
    """Tokens that differ from those of every other `first`."""
    return tuple(range(100 * first, 100 * first + length))


def make(*, num_blocks: int = 8, block_size: int = 4, max_num_seqs: int = 4, chunk_tokens: int = 16) -> Simulation:
    return Simulation(num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs, chunk_tokens=[chunk_tokens])


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
    assert (young.block_ids, young.num_computed) == ([], 0)


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


def test_schedule_when_a_prompt_is_longer_than_the_budget_cuts_it_and_the_rest_of_the_budget_goes_to_the_next() -> None:
    simulation = make(num_blocks=16, chunk_tokens=10)
    first = simulation.add(Arrival(prompt=prompt(0, 25), max_tokens=2), 0)
    second = simulation.add(Arrival(prompt=prompt(1, 12), max_tokens=2), 1)
    steps = [[(chunk.sequence, chunk.num_tokens) for chunk in simulation.step()] for _ in range(4)]
    assert steps == [[(first, 10)], [(first, 10)], [(first, 5), (second, 5)], [(first, 1), (second, 7)]]


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
    tables = [sequence.block_ids for sequence in simulation.scheduler.running]
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
