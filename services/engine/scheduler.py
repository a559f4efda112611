"""Decides what each engine step computes: who runs, who waits, whose blocks are taken back.

Oldest first, always. A step gives every running sequence that decodes its one token, then shares `prefill_chunk_tokens` among prompts in
order of arrival, and admits waiting sequences while there are slots, blocks and tokens left. A longer prompt takes as few steps as it can,
equal ones: each has room for short prompts behind it, and stalls those that decode no longer than it must.

When a decoding sequence finds no block, the youngest running one is preempted: it loses its blocks, waits at its old place in the queue and
is computed again later (its sealed blocks may still be cached then). The oldest sequence is never preempted and never passed over, so
everything that fits the pool alone finishes.

    waiting ──admit──▶ running ──finish──▶           a prompt computed here; ◀──preempt── gives way to an older one
    waiting ──admit──▶ running ──hold──▶ held        prefill only: its blocks are read by others until it is finished
    waiting ──admit──▶ reserved ──start──▶ running   a peer fills its blocks; ──quarantine──▶ waiting when the peer cannot be stopped

Others read or write the blocks of whoever is held, reserved or computes a prefill for somebody: these are never preempted. While they hold
all blocks even the oldest sequence may have to wait, and schedule() comes back empty. Each of them ends by a call from outside, and none of
them waits for a block (all are taken at admission), so once those calls come everything finishes.

Knows nothing of tensors or time. Source: iteration-level scheduling (Orca, Yu et al. 2022), chunked prefill (Sarathi, Agrawal et al.
2023), preemption by recompute (vLLM, Kwon et al. 2023).
"""

import bisect
from dataclasses import dataclass

from services.engine.kv_cache import KVCache
from services.engine.sequence import Purpose, Sequence

# Of a step: each has a row of logits, 128,000 fp32 numbers with the larger vocabularies.
SCORED_TOKENS = 128


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """`num_tokens` next tokens of a sequence to compute in this step."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """Owns the queue; one thread calls it, between engine steps."""

    def __init__(self, cache: KVCache, *, max_num_seqs: int, prefill_chunk_tokens: int) -> None:
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.waiting: list[Sequence] = []  # both lists are sorted by `order`
        self.running: list[Sequence] = []
        self.reserved: dict[str, Sequence] = {}  # by request id; they take a place in the batch, but are not computed yet
        self.held: dict[str, Sequence] = {}  # by request id; they take blocks only
        self.admitted: list[Sequence] = []  # by the last schedule()
        self.num_preemptions = 0
        self.num_cached_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether schedule() would do anything. If not, and somebody waits, only another call can change that."""
        return bool(self.running) or (bool(self.waiting) and self._has_place and self.cache.find(self.waiting[0]) is not None)

    @property
    def num_uncomputed_prompt_tokens(self) -> int:
        """Of sequences without a token from here yet, whose prompts are computed here."""
        sequences = [*self.running, *self.waiting]  # a copy at one blow: other threads may ask
        return sum(s.num_uncomputed for s in sequences if s.num_output_tokens == s.num_received and s.purpose is not Purpose.RECEIVE)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence at the place its order gives it."""
        bisect.insort(self.waiting, sequence, key=_order)

    def abort(self, request_id: str) -> list[Sequence]:
        """Drops all sequences of a request and frees their blocks; returns them."""
        everybody = [*self.waiting, *self.running, *self.reserved.values(), *self.held.values()]
        dropped = [sequence for sequence in everybody if sequence.request_id == request_id]
        for sequence in dropped:
            self.finish(sequence)
        return dropped

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; its sealed blocks stay cached."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            del (self.reserved if sequence.request_id in self.reserved else self.held)[sequence.request_id]
        self.cache.release(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Stops computing a sequence whose blocks others still read."""
        self.running.remove(sequence)
        self.held[sequence.request_id] = sequence

    def start(self, request_id: str, num_landed_tokens: int) -> Sequence:
        """A reserved sequence joins those that are computed here; its first tokens, cached ones included, have landed.

        If the window before the next token has not, it waits again, to be computed from what is cached.
        """
        sequence = self.reserved.pop(request_id)
        sequence.purpose = Purpose.GENERATE
        num_computed = max(num_landed_tokens, sequence.num_computed)
        if self.cache.can_go_on(sequence, num_computed):
            self.cache.computed(sequence, num_computed)
            bisect.insort(self.running, sequence, key=_order)
        else:
            self.cache.release(sequence)
            self.add(sequence)
        return sequence

    def quarantine(self, request_id: str) -> Sequence:
        """Takes a reserved sequence's blocks away, into quarantine where a peer may still write; it waits again, to be computed here."""
        sequence = self.reserved.pop(request_id)
        self.cache.quarantine(sequence)
        sequence.purpose = Purpose.GENERATE
        self.add(sequence)
        return sequence

    def schedule(self) -> list[ScheduledChunk]:
        """The work of the next step, sequences with one token first. Empty only when nobody runs, not even after it; see has_work."""
        self.admitted = []
        decodes: list[ScheduledChunk] = []
        preempted = False
        for sequence in list(self.running):
            if sequence not in self.running or sequence.num_uncomputed != 1:
                continue  # preempted by an older one just now, or still in its prompt
            while not self.cache.make_room(sequence):
                # `sequence` itself if there is no younger one; one that computes a prefill for others has all its blocks.
                victim = next(other for other in reversed(self.running) if other.purpose is Purpose.GENERATE)
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            else:
                decodes.append(ScheduledChunk(sequence, 1))
        prefills: list[ScheduledChunk] = []
        budget = _Budget(self.prefill_chunk_tokens)
        for sequence in self.running:
            if sequence.num_uncomputed > 1 and (num_tokens := budget.take(sequence)):
                prefills.append(ScheduledChunk(sequence, num_tokens))
        while not preempted and self.waiting and self._has_place:
            sequence = self.waiting[0]
            is_computed_here = sequence.purpose is not Purpose.RECEIVE
            if (is_computed_here and not budget.left(sequence)) or not self._admit(sequence):
                break  # nobody overtakes: a long prompt would starve behind short ones
            if not is_computed_here:
                continue
            prefills.append(ScheduledChunk(sequence, budget.take(sequence)))
        # A last chunk of one token is computed like a decode, and the batch wants those first.
        return decodes + sorted(prefills, key=lambda chunk: chunk.num_tokens > 1)

    def computed(self, chunk: ScheduledChunk) -> None:
        """The chunk's keys and values are in the pools: publishes the blocks it filled."""
        self.cache.computed(chunk.sequence, chunk.sequence.num_computed + chunk.num_tokens)

    @property
    def _has_place(self) -> bool:
        return len(self.running) + len(self.reserved) < self.max_num_seqs

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence the cached blocks of its prefix and new ones for all its tokens, or changes nothing."""
        finding = self.cache.find(sequence)
        if finding is None:
            return False
        self.cache.admit(sequence, finding)
        self.num_cached_tokens += sequence.num_computed
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
        if sequence.prompt_logprobs:
            sequence.prompt_logprobs.clear()  # preempted in its prompt: it begins again
        self.waiting.remove(sequence)
        if sequence.purpose is Purpose.RECEIVE:
            self.reserved[sequence.request_id] = sequence
        else:
            bisect.insort(self.running, sequence, key=_order)
        self.admitted.append(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.cache.release(sequence)
        self.num_preemptions += 1
        self.add(sequence)


class _Budget:
    """Prompt tokens that one step may still compute, and how many of them may be scored."""

    def __init__(self, num_tokens: int) -> None:
        self._most = self._num_tokens = num_tokens
        self._num_scored = SCORED_TOKENS

    def left(self, sequence: Sequence) -> int:
        return self._num_tokens if sequence.prompt_logprobs is None else min(self._num_tokens, self._num_scored)

    def take(self, sequence: Sequence) -> int:
        """The tokens of this sequence's next chunk; may be none."""
        num_steps = -(-sequence.num_uncomputed // self._most)
        num_tokens = min(-(-sequence.num_uncomputed // num_steps), self.left(sequence))
        self._num_tokens -= num_tokens
        if sequence.prompt_logprobs is not None:
            self._num_scored -= num_tokens
        return num_tokens


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
