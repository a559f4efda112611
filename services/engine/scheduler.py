"""Decides what each engine step computes: who runs, who waits, whose blocks are taken back.

Oldest first, always. A step gives every running sequence that decodes its one token, then shares `prefill_chunk_tokens` among prompts in
order of arrival, and admits waiting sequences while there are slots, blocks and tokens left. When a decoding sequence finds no block, the
youngest running one is preempted: it loses its blocks, waits at its old place in the queue, and is computed again later (its sealed blocks
may still be cached then). The oldest sequence is never preempted and never passed over, so everything that fits the pool alone finishes.

Knows nothing of tensors or time. Source: iteration-level scheduling (Orca, Yu et al. 2022), chunked prefill (Sarathi, Agrawal et al.
2023), preemption by recompute (vLLM, Kwon et al. 2023).
"""

import bisect
from dataclasses import dataclass

from services.engine.block_pool import BlockPool
from services.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """`num_tokens` next tokens of a sequence to compute in this step."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """Owns the queue and the block tables of all sequences; one thread calls it, between engine steps."""

    def __init__(self, pool: BlockPool, *, block_size: int, max_num_seqs: int, prefill_chunk_tokens: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.waiting: list[Sequence] = []  # both lists are sorted by `order`
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence at the place its order gives it."""
        bisect.insort(self.waiting, sequence, key=_order)

    def abort(self, request_id: str) -> list[Sequence]:
        """Drops all sequences of a request and frees their blocks; returns them."""
        dropped = [sequence for sequence in self.waiting + self.running if sequence.request_id == request_id]
        for sequence in dropped:
            self.finish(sequence)
        return dropped

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; its sealed blocks stay cached."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release_blocks(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """The work of the next step, sequences with one token first. Empty only when nothing waits or runs."""
        decodes: list[ScheduledChunk] = []
        preempted = False
        for sequence in list(self.running):
            if sequence not in self.running or sequence.num_uncomputed != 1:
                continue  # preempted by an older one just now, or still in its prompt
            while not self._has_room(sequence):
                victim = self.running[-1]
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            else:
                decodes.append(ScheduledChunk(sequence, 1))
        prefills: list[ScheduledChunk] = []
        budget = self.prefill_chunk_tokens
        for sequence in self.running:
            if sequence.num_uncomputed > 1 and budget:
                num_tokens = min(sequence.num_uncomputed, budget)
                budget -= num_tokens
                prefills.append(ScheduledChunk(sequence, num_tokens))
        while not preempted and self.waiting and budget and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break  # nobody overtakes: a long prompt would starve behind short ones
            num_tokens = min(sequence.num_uncomputed, budget)
            budget -= num_tokens
            prefills.append(ScheduledChunk(sequence, num_tokens))
        # A last chunk of one token is computed like a decode, and the batch wants those first.
        return decodes + sorted(prefills, key=lambda chunk: chunk.num_tokens > 1)

    def computed(self, chunk: ScheduledChunk) -> None:
        """The chunk's keys and values are in the pool: publishes the blocks it filled."""
        sequence = chunk.sequence
        sequence.num_computed += chunk.num_tokens
        num_full = sequence.num_computed // self.block_size
        if num_full > sequence.num_sealed:
            hashes = sequence.hash_full_blocks(self.block_size)
            for index in range(sequence.num_sealed, num_full):
                self.pool.seal(sequence.block_ids[index], hashes[index])
            sequence.num_sealed = num_full

    def _has_room(self, sequence: Sequence) -> bool:
        """Takes the block that the sequence's newest token needs, if it needs one and there is one."""
        missing = self._num_blocks(len(sequence.tokens)) - len(sequence.block_ids)
        if missing and not self.pool.can_allocate(missing):
            return False
        sequence.block_ids.extend(self.pool.allocate(missing))
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence the cached blocks of its prefix and new ones for all its tokens, or changes nothing."""
        # At least one token is computed even if all blocks are cached: somebody has to make the logits.
        usable = (len(sequence.tokens) - 1) // self.block_size
        shared = self.pool.match_prefix(sequence.hash_full_blocks(self.block_size)[:usable])
        missing = self._num_blocks(len(sequence.tokens)) - len(shared)
        if not self.pool.can_allocate(missing, shared=shared):
            return False
        self.pool.share(shared)
        sequence.block_ids = shared + self.pool.allocate(missing)
        sequence.num_sealed = len(shared)
        sequence.num_computed = len(shared) * self.block_size
        self.num_cached_tokens += sequence.num_computed
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.num_computed, sequence.prompt_length)
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_order)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release_blocks(sequence)
        self.num_preemptions += 1
        self.add(sequence)

    def _release_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = sequence.num_sealed = 0

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
