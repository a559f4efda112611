"""A scheduler without a model: tokens are made up, but every cell of the KV cache is followed, so that a mixed-up block shows.

The simulation writes into each cell what a model would: a number that stands for the token and all tokens before it. A sequence whose
blocks hold anything else would read another's keys and values. Peers write whatever they like into the blocks that are reserved for them,
until they have answered and, if they could not be stopped, until their quarantine is lifted.
"""

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st

from services.core.types import SamplingParams
from services.engine.block_pool import BlockPool
from services.engine.kv_cache import KVCache
from services.engine.kv_groups import KVGroups
from services.engine.scheduler import ScheduledChunk, Scheduler
from services.engine.sequence import Purpose, Sequence


class Answer(enum.Enum):
    """How a peer's work on a reserved request ends."""

    LANDED = enum.auto()
    COMPUTE_HERE = enum.auto()
    QUARANTINE = enum.auto()
    QUARANTINE_AND_DROP = enum.auto()
    ABORT = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Answers so many ticks after it could begin; who holds a prefill's blocks lets go of them then.

    landed_tokens   for COMPUTE_HERE: from the start of the prompt
    fence_after     ticks until its quarantine is lifted
    """

    delay: int
    answer: Answer = Answer.LANDED
    landed_tokens: int = 0
    fence_after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request of the simulation; it comes at `step` and is aborted `abort_after` ticks later if it still runs."""

    prompt: tuple[int, ...]
    max_tokens: int
    step: int = 0
    choices: int = 1
    abort_after: int | None = None
    tenant: int = 0
    purpose: Purpose = Purpose.GENERATE
    peer: Peer | None = None  # for those who do not generate on their own

    @property
    def total_tokens(self) -> int:
        return len(self.prompt) + self.max_tokens

    @property
    def is_dropped(self) -> bool:
        """It may end before its tokens are complete."""
        return self.abort_after is not None or (
            self.peer is not None and self.peer.answer in (Answer.ABORT, Answer.QUARANTINE_AND_DROP) and self.purpose is Purpose.RECEIVE
        )


class Simulation:
    """A scheduler, its pools, and cells that remember what was written into them.

    num_blocks   of each KV group's pool; windows: of the groups
    """

    def __init__(
        self,
        *,
        num_blocks: list[int],
        windows: tuple[int | None, ...],
        block_size: int,
        max_num_seqs: int,
        chunk_tokens: list[int],
    ) -> None:
        self.groups = KVGroups(windows, block_size)
        cache = KVCache(num_blocks, self.groups, chunk_tokens=max(chunk_tokens))
        self.pools = cache.pools
        self.most_blocks = [self.groups.most_blocks(group, max(chunk_tokens)) for group in range(len(self.pools))]
        self.block_size = block_size
        self.scheduler = Scheduler(cache, max_num_seqs=max_num_seqs, prefill_chunk_tokens=chunk_tokens[0])
        self.chunk_tokens = chunk_tokens
        self.cells: dict[tuple[int, int], int] = {}  # (group, cell) → history
        self.finished: list[tuple[int, int]] = []
        self.handed_over: list[str] = []  # prefills whose blocks have been let go
        self.has_choices = self.has_peers = False
        self.steps = self.now = 0
        self._quarantined: set[tuple[int, int]] = set()  # (group, block)
        self._peers: dict[str, Peer] = {}
        self._coming: list[tuple[int, Callable[[], None]]] = []  # when peers act
        self._histories: dict[tuple[int, int], int] = {}  # (history before, token) → history

    @property
    def pool(self) -> BlockPool:
        return self.pools[0]

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
            purpose=arrival.purpose,
        )
        self.has_choices |= arrival.choices > 1
        self.has_peers |= arrival.purpose is not Purpose.GENERATE
        self._peers[sequence.request_id] = arrival.peer or Peer(delay=0)
        self.scheduler.add(sequence)
        return sequence

    def run(self, arrivals: list[Arrival]) -> None:
        """Everything, to the end, with checks at each step; no sequence may take longer than `bound` allows all of them."""
        pending = sorted(arrivals, key=lambda arrival: arrival.step)
        in_order = list(pending)
        aborts: list[tuple[int, str]] = []
        order = 0
        while pending or self._coming or self.scheduler.has_work or self.scheduler.waiting:
            while pending and pending[0].step <= self.now:
                arrival = pending.pop(0)
                self.add(arrival, order)
                if arrival.abort_after is not None:
                    aborts.append((self.now + arrival.abort_after, str(order)))
                order += 1
            for request_id in [request_id for at, request_id in aborts if at == self.now]:
                self.abort(request_id)
            self.tick()
            assert self.steps <= self.bound(arrivals)
            assert self.now <= self.bound(arrivals) + sum(a.step + a.peer.delay + a.peer.fence_after + 2 for a in arrivals if a.peer) + 25
        assert self.scheduler.schedule() == []
        assert not self.scheduler.running + self.scheduler.waiting
        assert not self.scheduler.reserved
        assert not self.scheduler.held
        assert all((pool.num_owned, pool.num_quarantined) == (0, 0) for pool in self.pools)
        for index, arrival in enumerate(in_order):
            if arrival.purpose is Purpose.PREFILL:
                assert arrival.is_dropped or str(index) in self.handed_over
            elif not arrival.is_dropped:
                assert {(index, choice) for choice in range(arrival.choices)} <= set(self.finished)
        assert len(self.finished) == len(set(self.finished))

    def bound(self, arrivals: list[Arrival]) -> int:
        """Steps that suffice for all sequences one after another.

        The oldest running sequence advances in every step and, without further choices, never loses what it has. A further choice joins
        ahead of younger running requests and may once cost the oldest of these its blocks. So may whoever cannot be preempted.
        """
        chunk = min(self.chunk_tokens)
        prefills = [-(-arrival.total_tokens // chunk) for arrival in arrivals]
        alone = sum(arrival.choices * (prefill + arrival.max_tokens) for arrival, prefill in zip(arrivals, prefills, strict=True))
        intruders = sum(arrival.choices - 1 + (arrival.purpose is not Purpose.GENERATE) for arrival in arrivals)
        return alone + intruders * max(prefills)

    def tick(self) -> None:
        """Peers act, and a step is made if there is anything to do."""
        self.scribble()
        due = [act for at, act in self._coming if at <= self.now]
        self._coming = [(at, act) for at, act in self._coming if at > self.now]
        for act in due:
            act()
            self.check_blocks()
            self.check_cells()
        if self.scheduler.has_work:
            self.step()
        self.now += 1

    def abort(self, request_id: str) -> None:
        scheduler = self.scheduler
        everybody = [*scheduler.running, *scheduler.waiting, *scheduler.reserved.values(), *scheduler.held.values()]
        before = [sequence for sequence in everybody if sequence.request_id == request_id]
        dropped = scheduler.abort(request_id)
        assert sorted(map(id, dropped)) == sorted(map(id, before))
        assert all(not sequence.tables for sequence in dropped)
        everybody = [*scheduler.running, *scheduler.waiting, *scheduler.reserved.values(), *scheduler.held.values()]
        assert all(sequence.request_id != request_id for sequence in everybody)
        self.check_blocks()

    def step(self) -> list[ScheduledChunk]:
        scheduler = self.scheduler
        scheduler.prefill_chunk_tokens = self.chunk_tokens[self.steps % len(self.chunk_tokens)]
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        decoding = [sequence for sequence in running if sequence.num_uncomputed == 1]
        had_work = scheduler.has_work
        chunks = scheduler.schedule()
        assert had_work == bool(chunks or scheduler.admitted or scheduler.running != running)
        self.check_order(running, waiting, decoding, chunks)
        self.check_chunks(decoding, chunks)
        self.check_blocks()
        for sequence in scheduler.admitted:
            if sequence.purpose is Purpose.RECEIVE:
                self.later(self._peers[sequence.request_id].delay, functools.partial(self.answer, sequence.request_id))
        self.compute(chunks)
        self.check_blocks()
        self.check_cells()
        for chunk in chunks:
            self.sample(chunk.sequence)
        self.steps += bool(chunks)
        return chunks

    def compute(self, chunks: list[ScheduledChunk]) -> None:
        """What the model does, then what the engine core tells the scheduler."""
        for chunk in chunks:
            self.write(chunk.sequence, chunk.sequence.num_computed, chunk.sequence.num_computed + chunk.num_tokens)
        for chunk in chunks:
            self.scheduler.computed(chunk)

    def write(self, sequence: Sequence, start: int, end: int) -> None:
        """Keys and values of tokens start … end - 1."""
        histories = self.histories(sequence)
        for group, table in enumerate(sequence.tables):
            for position in range(max(start, table.first * self.block_size), end):
                self.cells[group, self.cell(sequence, group, position)] = histories[position]

    def land(self, sequence: Sequence, end: int) -> None:
        """A peer fills its places with keys and values of the tokens before `end`."""
        histories, size = self.histories(sequence), self.block_size
        for (group, block), (_, block_id) in zip(
            self.groups.places(len(sequence.tokens), sequence.num_sealed), self.received_blocks(sequence), strict=True
        ):
            for position in range(block * size, min((block + 1) * size, end)):
                self.cells[group, block_id * size + position % size] = histories[position]

    def sample(self, sequence: Sequence) -> None:
        """Adds a made-up token once all tokens are computed; the first one brings the further choices."""
        if sequence.num_uncomputed:
            return
        if sequence.purpose is Purpose.PREFILL:
            self.scheduler.hold(sequence)
            self.later(self._peers[sequence.request_id].delay, lambda: self.let_go(sequence))
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

    def later(self, ticks: int, act: Callable[[], None]) -> None:
        self._coming.append((self.now + ticks, act))

    def let_go(self, sequence: Sequence) -> None:
        """Somebody has copied the blocks of a prefill."""
        if sequence.request_id in self.scheduler.held:
            self.check_cells()
            self.scheduler.finish(sequence)
            self.handed_over.append(sequence.request_id)

    def answer(self, request_id: str) -> None:
        """A peer's work on a reserved request ends as it was planned."""
        sequence = self.scheduler.reserved.get(request_id)
        if sequence is None:
            return  # aborted
        peer, block_size = self._peers[request_id], self.block_size
        if peer.answer is Answer.LANDED:
            self.land(sequence, sequence.prompt_length)
            self.sample(self.scheduler.start(request_id, sequence.prompt_length))
        elif peer.answer is Answer.COMPUTE_HERE:
            whole = min(peer.landed_tokens, sequence.prompt_length - 1) // block_size * block_size
            self.land(sequence, whole)
            self.scheduler.start(request_id, whole)
        elif peer.answer is Answer.ABORT:
            self.abort(request_id)
        else:
            blocks = self.received_blocks(sequence)
            assert self.scheduler.quarantine(request_id) is sequence
            assert sequence in self.scheduler.waiting
            self._quarantined.update(blocks)
            if peer.answer is Answer.QUARANTINE_AND_DROP:
                self.abort(request_id)
            self.later(peer.fence_after, lambda: self.lift(blocks))

    def lift(self, blocks: list[tuple[int, int]]) -> None:
        for group, block_id in blocks:
            self.pools[group].lift_quarantine([block_id])
        self._quarantined.difference_update(blocks)

    def received_blocks(self, sequence: Sequence) -> list[tuple[int, int]]:
        """(group, block) of each place that a peer fills."""
        places = self.groups.places(len(sequence.tokens), sequence.num_sealed)
        return [(group, sequence.tables[group].block_ids[block - sequence.tables[group].first]) for group, block in places]

    def scribble(self) -> None:
        """Peers write nonsense wherever they may."""
        size = self.block_size
        open_to_peers = set(self._quarantined)
        for sequence in self.scheduler.reserved.values():
            open_to_peers.update(self.received_blocks(sequence))
        for group, block_id in open_to_peers:
            for cell in range(block_id * size, (block_id + 1) * size):
                self.cells[group, cell] = -1000
        self.check_cells()

    def histories(self, sequence: Sequence) -> list[int]:
        """For each position a number that stands for the tokens up to it, under the sequence's key."""
        history, result = -1 - int(sequence.prefix_key[-1:]), []
        for token in sequence.tokens:
            history = self._histories.setdefault((history, token), len(self._histories))
            result.append(history)
        return result

    def cell(self, sequence: Sequence, group: int, position: int) -> int:
        size, table = self.block_size, sequence.tables[group]
        assert position // size >= table.first
        return table.block_ids[position // size - table.first] * size + position % size

    def check_order(self, running: list[Sequence], waiting: list[Sequence], decoding: list[Sequence], chunks: list[ScheduledChunk]) -> None:
        """Who may go first; `running`, `waiting` and `decoding` are from before schedule()."""
        scheduler = self.scheduler
        assert scheduler.running == sorted(scheduler.running, key=lambda sequence: sequence.order)
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda sequence: sequence.order)
        reserved = [sequence for sequence in scheduler.admitted if sequence.purpose is Purpose.RECEIVE]
        assert all(scheduler.reserved[sequence.request_id] is sequence for sequence in reserved)
        assert sorted(map(id, running + waiting)) == sorted(map(id, scheduler.running + scheduler.waiting + reserved))
        assert len(scheduler.running) + len(scheduler.reserved) <= scheduler.max_num_seqs
        served = [chunk.sequence for chunk in chunks]
        if not self.has_peers:
            oldest = running[0] if running else waiting[0]
            assert oldest in served
            if not self.has_choices:
                assert oldest is min(running + waiting, key=lambda sequence: sequence.order)
                orders = [sequence.order for sequence in scheduler.running + scheduler.waiting]
                assert orders == sorted(orders)  # everyone who runs came before everyone who waits
        preempted = [sequence for sequence in running if sequence not in scheduler.running]
        assert all(sequence.purpose is Purpose.GENERATE for sequence in preempted)
        assert scheduler.admitted == waiting[: len(scheduler.admitted)]  # nobody overtakes
        assert not (preempted and scheduler.admitted)
        stayed = [sequence for sequence in scheduler.running if sequence.purpose is Purpose.GENERATE]
        assert all(kept.order < lost.order for kept in stayed for lost in preempted)
        assert all(sequence in served for sequence in decoding if sequence not in preempted)
        budget_left = scheduler.prefill_chunk_tokens - sum(chunk.num_tokens for chunk in chunks if chunk.sequence not in decoding)
        has_place = len(scheduler.running) + len(scheduler.reserved) < scheduler.max_num_seqs
        if scheduler.waiting and has_place and not preempted:
            first = scheduler.waiting[0]
            if budget_left or first.purpose is Purpose.RECEIVE:
                needs = (min(self.groups.num_blocks(len(first.tokens)), most or len(first.tokens)) for most in self.most_blocks)
                assert not all(pool.can_allocate(need) for pool, need in zip(self.pools, needs, strict=True))  # no room is left idle

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
            assert all(sequence.num_computed + chunk.num_tokens <= table.end * self.block_size for table in sequence.tables)

    def check_blocks(self) -> None:
        """The pools' balance, that a block in two tables has one content, and that nobody keeps what lies behind its window."""
        size = self.block_size
        for group, pool in enumerate(self.pools):
            assert pool.num_free + pool.num_cached + pool.num_owned + pool.num_quarantined == pool.num_blocks
            assert pool.num_quarantined == sum(of == group for of, _ in self._quarantined)
        for sequence in self.scheduler.waiting:
            assert (sequence.tables, sequence.num_computed, sequence.num_sealed) == ([], 0, 0)
        users: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for sequence in self.owners():
            histories = self.histories(sequence)
            for group, (table, most) in enumerate(zip(sequence.tables, self.most_blocks, strict=True)):
                assert len(set(table.block_ids)) == len(table.block_ids) <= (most or len(table.block_ids))
                assert table.end <= self.groups.num_blocks(len(sequence.tokens))
                if sequence not in self.scheduler.reserved.values():
                    first, kept = (at(group, sequence.num_computed) for at in (self.groups.first_block, self.groups.first_kept))
                    assert kept <= table.first <= first
                for block, block_id in enumerate(table.block_ids, table.first):
                    end = (block + 1) * size
                    # What the block is to hold: its content once computed, else a mark that nobody else has.
                    holds = (histories[end - 1], block) if end <= sequence.num_computed else (-id(sequence), block)
                    users.setdefault((group, block_id), set()).add(holds)
        assert all(len(contents) == 1 for contents in users.values())
        assert [sum(of == group for of, _ in users) for group in range(len(self.pools))] == [pool.num_owned for pool in self.pools]
        assert not self._quarantined & users.keys()

    def check_cells(self) -> None:
        """Every computed token that the next one sees, in every group of layers, has its own keys and values behind it."""
        for sequence in self.owners():
            histories, end = self.histories(sequence), sequence.num_computed
            for group, window in enumerate(self.groups.windows):
                first = 0 if window is None else max(end - window + 1, 0)
                if sequence in self.scheduler.reserved.values():  # what a peer need not fill may be missing
                    first = max(first, sequence.tables[group].first * self.block_size)
                seen = range(first, max(first, end))
                assert [self.cells[group, self.cell(sequence, group, position)] for position in seen] == histories[seen.start : seen.stop]

    def owners(self) -> list[Sequence]:
        scheduler = self.scheduler
        return [*scheduler.running, *scheduler.reserved.values(), *scheduler.held.values()]


@st.composite
def simulations(draw: st.DrawFn, num_blocks: int, block_size: int) -> Simulation:
    """Whose sequences have at most `num_blocks` blocks of tokens: of a model that keeps all tokens, a window only, or both in KV groups."""
    chunk_tokens = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    windows = draw(st.lists(st.integers(1, 3 * block_size + 1), max_size=2, unique=True))
    keeps_all = not windows or draw(st.booleans())
    groups = KVGroups((None, *windows) if keeps_all else tuple(windows), block_size)
    sizes = [num_blocks]
    for group in range(1, len(groups.windows)) if keeps_all else range(len(windows)):
        least = min(num_blocks, groups.most_blocks(group, max(chunk_tokens)) or num_blocks)
        sizes[group:] = [draw(st.integers(least, num_blocks))]
    return Simulation(
        num_blocks=sizes,
        windows=groups.windows,
        block_size=block_size,
        max_num_seqs=draw(st.integers(1, 5)),
        chunk_tokens=chunk_tokens,
    )


def prompt(first: int, length: int) -> tuple[int, ...]:
    """Tokens that differ from those of every other `first`."""
    return tuple(range(100 * first, 100 * first + length))


def make_simulation(*, num_blocks: int = 8, block_size: int = 4, max_num_seqs: int = 4, chunk_tokens: int = 16) -> Simulation:
    return Simulation(
        num_blocks=[num_blocks], windows=(None,), block_size=block_size, max_num_seqs=max_num_seqs, chunk_tokens=[chunk_tokens]
    )
