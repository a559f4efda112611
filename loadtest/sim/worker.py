"""A simulated worker: the engine's scheduling rules, without a model. Continuous batching, chunked prefill, the engine's own block pool.

Each step takes what the model says. While nobody computes a prompt the batch changes only when somebody ends or needs another block, so all
steps until then are one event, a *stretch*; whoever arrives meanwhile joins at the end of the step that runs. First come, first served, and
nobody overtakes; without a free block the youngest is put back and computed again.

Knows no router and no network: what happened to a sequence is told to its owner.
"""

import enum
import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Protocol

from loadtest.sim.events import Events
from loadtest.sim.worker_model import Chunk, WorkerModel
from services.engine.block_pool import BlockPool


class Purpose(enum.Enum):
    GENERATE = "generate"  # its prompt is computed here, and then it decodes
    PREFILL = "prefill"  # its prompt is computed here, for another worker
    RECEIVE = "receive"  # its prompt will land here, then it decodes


class Chunks(enum.StrEnum):
    """What a step takes of a prompt that is longer than its chunk."""

    EVEN = "even"  # its rest by the number of steps that it needs: as the engine does
    FULL = "full"  # all that there is room for


class Owner(Protocol):
    """Whoever sent a sequence; told at the time at which it happens."""

    def admitted(self) -> None:
        """It has blocks; `num_cached` tokens of it were there."""

    def computed(self, num_tokens: int) -> None:
        """A chunk of its prompt has been computed; it was the last one when nothing is uncomputed."""

    def first_step_done(self) -> None:
        """It has made its first decode step; told again when it was put back before."""

    def finished(self) -> None:
        """It has made its last one; its blocks are free, or cached."""


@dataclass(slots=True, eq=False)
class SimSequence:
    """
    hashes          of the prompt's full blocks
    prompt_tokens   that must be there before it decodes
    decode_steps    that it makes then
    has_first       its first token is known when it begins to decode
    """

    owner: Owner
    hashes: Sequence[bytes]
    prompt_tokens: int
    decode_steps: int
    purpose: Purpose
    has_first: bool
    num_cached: int = -1  # tokens found when first admitted; -1: not yet
    num_computed: int = 0
    num_sealed: int = 0
    block_ids: list[int] = field(default_factory=list)
    order: int = -1
    begun_at_step: int = -1
    life: int = 0  # number of times it began or was put back: plans of an earlier life do not count

    @property
    def num_uncomputed(self) -> int:
        return self.prompt_tokens - self.num_computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a worker reports; the fields that baton.v1.WorkerLoad has."""

    num_running: int
    num_waiting: int
    uncomputed_prompt_tokens: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    engine_steps: int
    prefill_tokens: int
    decode_tokens: int
    step_s: float
    max_num_seqs: int
    draining: bool = False


class SimWorker:
    """`on_step` is called after each step or stretch: its load and its pool may have changed."""

    def __init__(
        self, worker_id: str, model: WorkerModel, events: Events, *, on_step: Callable[["SimWorker"], None], chunks: Chunks = Chunks.EVEN
    ) -> None:
        self.worker_id = worker_id
        self.model = model
        self.pool = BlockPool(model.num_blocks)
        self.waiting: deque[SimSequence] = deque()
        self._events = events
        self._on_step = on_step
        self._is_even = chunks is Chunks.EVEN
        self._orders = count()
        self._prefilling: list[SimSequence] = []  # by order
        self._decoding: dict[SimSequence, None] = {}
        self._context_tokens = 0  # of all that decode, their prompts' and those they have made
        self._new: list[SimSequence] = []  # decode from the next step on
        self._num_reserved = 0
        # Plans of decoding sequences, by the number of the step at which they come due: (step, tie, life, sequence).
        self._ends: list[tuple[int, int, int, SimSequence]] = []
        self._growths: list[tuple[int, int, int, SimSequence]] = []
        self._uncomputed = 0
        self._in_turn = False
        # The stretch that runs: when it began, its step, how many steps it has, the chunks of its prompts, how often it has been planned.
        self._began_s = self._step_s = 0.0
        self._planned_steps = 0
        self._chunks: list[tuple[SimSequence, int]] = []
        self._plan = 0
        self._step_number = 0  # decode steps made
        self.num_steps = self.num_prefill_tokens = self.num_decode_tokens = self.num_preemptions = 0
        self.busy_s = 0.0

    @property
    def step_began_s(self) -> float:
        """When the step began that runs, or has just ended."""
        return self._began_s

    # What others ask of it

    def submit(self, sequence: SimSequence) -> None:
        """Takes a sequence; it waits for a place and blocks."""
        sequence.order = next(self._orders)
        self.waiting.append(sequence)
        if sequence.purpose is not Purpose.RECEIVE:
            self._uncomputed += sequence.num_uncomputed
        self._wake()

    def start(self, sequence: SimSequence, num_landed: int) -> None:
        """A sequence that has blocks here, and of its prompt these tokens: what is missing is computed here, then it decodes."""
        self._num_reserved -= 1
        sequence.purpose = Purpose.GENERATE
        self._seal(sequence, max(num_landed, sequence.num_computed))
        if sequence.num_uncomputed:
            self._uncomputed += sequence.num_uncomputed
            insort(self._prefilling, sequence, key=_order)
        elif sequence.decode_steps:
            self._new.append(sequence)
        else:
            self._finish(sequence)
        self._wake()

    def release(self, sequence: SimSequence) -> None:
        """A prompt computed here for another worker has been taken there."""
        self.pool.release(sequence.block_ids)
        self._wake()

    def cached_tokens(self, hashes: Sequence[bytes], prompt_tokens: int) -> int:
        """Of a prompt, those that are here now and may be used."""
        block_size = self.model.block_size
        return block_size * len(self.pool.match_prefix(hashes[: (prompt_tokens - 1) // block_size]))

    def load(self) -> Load:
        """As of now, within a stretch too."""
        done = self._steps_done() if self._planned_steps else 0
        num_decoding = len(self._decoding)
        return Load(
            num_running=len(self._prefilling) + num_decoding + len(self._new),
            num_waiting=len(self.waiting),
            uncomputed_prompt_tokens=self._uncomputed,
            blocks_total=self.pool.num_blocks,
            blocks_free=self.pool.num_free,
            blocks_cached=self.pool.num_cached,
            engine_steps=self.num_steps + done,
            prefill_tokens=self.num_prefill_tokens,
            decode_tokens=self.num_decode_tokens + done * num_decoding,
            step_s=self.busy_s + done * self._step_s,
            max_num_seqs=self.model.max_num_seqs,
        )

    # Its steps

    def _wake(self) -> None:
        """Something has changed: begins to step, or ends a stretch with the step that runs, so that it counts."""
        if self._in_turn:
            return
        if not self._planned_steps:
            self._turn()
        elif self._planned_steps > 1:
            self._plan_end(min(self._planned_steps, self._steps_done() + 1))

    def _steps_done(self) -> int:
        """Whole steps of the stretch that runs; a step that ends now is done only when its event has come."""
        done = int((self._events.now_s - self._began_s) / self._step_s + 1e-9)
        return min(done, self._planned_steps - 1)

    def _plan_end(self, num_steps: int) -> None:
        self._planned_steps = num_steps
        self._plan += 1
        self._events.at(self._began_s + num_steps * self._step_s, partial(self._end, self._plan))

    def _turn(self) -> None:
        """Between two steps: lets in whoever fits, and plans what comes next."""
        self._in_turn = True
        new, self._new = self._new, []
        for sequence in new:
            self._join(sequence)
        self._grow()
        self._chunks = self._schedule()
        self._in_turn = False
        if not self._chunks and not self._decoding:
            if self._new or self._prefilling:  # begun by an owner just now
                self._turn()
            return
        chunks = [Chunk(num_tokens, sequence.num_computed) for sequence, num_tokens in self._chunks]
        self._began_s = self._events.now_s
        # A stretch grows by a block or so before somebody needs one more: its first step stands for all of them.
        self._step_s = self.model.step_s(chunks, len(self._decoding), self._context_tokens / self.model.block_size)
        for sequence in new:
            if sequence in self._decoding:  # not put back at once
                self._events.at(self._began_s + self._step_s, sequence.owner.first_step_done)
        self._plan_end(1 if chunks else self._next_change() - self._step_number)

    def _end(self, plan: int) -> None:
        """The stretch is over."""
        if plan != self._plan:
            return
        num_steps, self._planned_steps = self._planned_steps, 0
        self._in_turn = True
        self.num_steps += num_steps
        self.busy_s += num_steps * self._step_s
        if self._decoding:
            self._step_number += num_steps
            self.num_decode_tokens += num_steps * len(self._decoding)
            self._context_tokens += num_steps * len(self._decoding)
            while (ended := self._due(self._ends)) is not None:
                self._leave(ended)
                self._finish(ended)
        for sequence, num_tokens in self._chunks:
            self._computed(sequence, num_tokens)
        self._chunks = []
        self._in_turn = False
        self._turn()
        self._on_step(self)

    def _computed(self, sequence: SimSequence, num_tokens: int) -> None:
        self.num_prefill_tokens += num_tokens
        self._uncomputed -= num_tokens
        self._seal(sequence, sequence.num_computed + num_tokens)
        if not sequence.num_uncomputed:
            self._prefilling.remove(sequence)
            if sequence.purpose is Purpose.GENERATE and sequence.decode_steps:
                self._new.append(sequence)
        sequence.owner.computed(num_tokens)
        if sequence.purpose is Purpose.GENERATE and not sequence.num_uncomputed and not sequence.decode_steps:
            self._finish(sequence)

    def _finish(self, sequence: SimSequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.owner.finished()

    def _schedule(self) -> list[tuple[SimSequence, int]]:
        budget = self.model.chunk_tokens
        chunks: list[tuple[SimSequence, int]] = []

        def take(sequence: SimSequence) -> None:
            nonlocal budget
            num_steps = -(-sequence.num_uncomputed // self.model.chunk_tokens) if self._is_even else 1
            num_tokens = min(budget, -(-sequence.num_uncomputed // num_steps))
            if num_tokens:
                chunks.append((sequence, num_tokens))
                budget -= num_tokens

        for sequence in self._prefilling:
            take(sequence)
        while self.waiting:
            sequence = self.waiting[0]
            num_active = len(self._prefilling) + len(self._decoding) + len(self._new) + self._num_reserved
            is_computed_here = sequence.purpose is not Purpose.RECEIVE
            if num_active >= self.model.max_num_seqs or (is_computed_here and not budget) or not self._admit(sequence):
                break
            self.waiting.popleft()
            if is_computed_here:
                insort(self._prefilling, sequence, key=_order)
                take(sequence)
            else:
                self._num_reserved += 1
            sequence.owner.admitted()
        return chunks

    def _admit(self, sequence: SimSequence) -> bool:
        block_size = self.model.block_size
        shared = self.pool.match_prefix(sequence.hashes[: (sequence.prompt_tokens - 1) // block_size])
        missing = -(-sequence.prompt_tokens // block_size) - len(shared)
        if not self.pool.can_allocate(missing, shared=shared):
            return False
        self.pool.share(shared)
        sequence.block_ids = shared + self.pool.allocate(missing)
        sequence.num_sealed = len(shared)
        sequence.num_computed = len(shared) * block_size
        if sequence.purpose is not Purpose.RECEIVE:
            self._uncomputed -= sequence.num_computed
        if sequence.num_cached < 0:
            sequence.num_cached = sequence.num_computed
        return True

    def _seal(self, sequence: SimSequence, num_computed: int) -> None:
        sequence.num_computed = num_computed
        num_full = min(num_computed // self.model.block_size, len(sequence.hashes))
        for index in range(sequence.num_sealed, num_full):
            self.pool.seal(sequence.block_ids[index], sequence.hashes[index])
        sequence.num_sealed = max(sequence.num_sealed, num_full)

    # Decoding

    def _join(self, sequence: SimSequence) -> None:
        """It decodes from the step on that is about to begin."""
        sequence.life += 1
        sequence.begun_at_step = self._step_number
        self._decoding[sequence] = None
        self._context_tokens += sequence.prompt_tokens
        heapq.heappush(self._ends, (self._step_number + sequence.decode_steps, sequence.order, sequence.life, sequence))
        self._plan_growth(sequence)

    def _leave(self, sequence: SimSequence) -> None:
        """It decodes no longer."""
        del self._decoding[sequence]
        self._context_tokens -= sequence.prompt_tokens + self._step_number - sequence.begun_at_step

    def _plan_growth(self, sequence: SimSequence) -> None:
        """The step for which it needs one block more: token i of its continuation is fed in step i, and needs room."""
        room = len(sequence.block_ids) * self.model.block_size
        steps = room - sequence.prompt_tokens + (0 if sequence.has_first else 1)
        heapq.heappush(self._growths, (sequence.begun_at_step + steps, sequence.order, sequence.life, sequence))

    def _due(self, plans: list[tuple[int, int, int, SimSequence]]) -> SimSequence | None:
        """The next sequence whose time has come; plans of an earlier life are thrown away."""
        while plans and plans[0][0] <= self._step_number:
            _, _, life, sequence = heapq.heappop(plans)
            if life == sequence.life and sequence in self._decoding:
                return sequence
        return None

    def _next_change(self) -> int:
        """The number of the step after which somebody ends or needs a block."""
        numbers = []
        for plans in (self._ends, self._growths):
            while plans and plans[0][2] != plans[0][3].life:
                heapq.heappop(plans)
            if plans:
                numbers.append(plans[0][0])
        return max(min(numbers), self._step_number + 1)

    def _grow(self) -> None:
        """Gives another block to everybody whose next token needs one; puts the youngest back while there is none."""
        while (sequence := self._due(self._growths)) is not None:
            while not self.pool.can_allocate(1):
                victim = max(self._decoding, key=_order)
                self._put_back(victim)
                if victim is sequence:
                    break
            else:
                sequence.block_ids.extend(self.pool.allocate(1))
                self._plan_growth(sequence)

    def _put_back(self, sequence: SimSequence) -> None:
        """Takes everything from it: its prompt and what it has made are computed here again."""
        self.num_preemptions += 1
        # The token that is to be fed next is computed with the rest, and that gives the one after it.
        made = self._step_number - sequence.begun_at_step + sequence.has_first
        self._leave(sequence)
        self.pool.release(sequence.block_ids)
        sequence.life += 1
        sequence.block_ids = []
        sequence.prompt_tokens += made
        sequence.decode_steps -= made
        sequence.num_computed = sequence.num_sealed = 0
        self._uncomputed += sequence.num_uncomputed
        self.waiting.appendleft(sequence)


def _order(sequence: SimSequence) -> int:
    return sequence.order
