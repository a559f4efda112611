"""Which worker holds which KV blocks, as far as their events tell: the router's replica, and the index service's own state.

Every worker numbers its events within an epoch (one start of it). An event that does not follow the last one known is refused, and the
worker's blocks are unknown until a snapshot comes: a missed `removed` would send requests after blocks that are gone. Looking a prompt up
is one dictionary access and one AND for every STRIDE blocks, and a few more where a worker's prefix ends, for all workers at once. Knows
nothing of the network, of load or of tokens.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field

# A look-up in a large dictionary misses the processor's cache four times, so most blocks are passed over: a pool evicts a prompt's tail
# before its head, and who holds a block holds those before it. Where that is not so, a request finds less than it was routed for.
STRIDE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Workers (bits of `workers` are slots) that hold the first `num_blocks` blocks of a prompt, and not the next."""

    num_blocks: int
    workers: int


@dataclass(slots=True, kw_only=True)
class _Worker:
    slot: int
    bit: int  # 1 << slot; one object, which all blocks that only this worker holds share
    epoch: int
    sequence_number: int
    hashes: set[bytes] = field(default_factory=set)


class PrefixIndex:
    """Blocks of many workers. A worker keeps its slot, a small number, from its first snapshot until it is forgotten."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}  # block hash → bitmask of slots; never 0
        self._workers: dict[str, _Worker] = {}
        self._worker_ids: list[str | None] = []  # by slot; None: free

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._workers

    @property
    def worker_ids(self) -> Sequence[str | None]:
        """By slot; None where a slot is free."""
        return self._worker_ids

    @property
    def num_entries(self) -> int:
        """Pairs (worker, block)."""
        return sum(len(worker.hashes) for worker in self._workers.values())

    def position(self, worker_id: str) -> tuple[int, int] | None:
        """(epoch, sequence number) of the last event applied; None for a worker that needs a snapshot."""
        worker = self._workers.get(worker_id)
        return None if worker is None else (worker.epoch, worker.sequence_number)

    def hashes(self, worker_id: str) -> Set[bytes]:
        """The worker's blocks, a live view; empty for an unknown worker."""
        worker = self._workers.get(worker_id)
        return frozenset() if worker is None else worker.hashes

    def replace(self, worker_id: str, *, epoch: int, sequence_number: int, hashes: Iterable[bytes]) -> None:
        """Takes a snapshot of all the worker's blocks after the event `sequence_number`, whatever was known before."""
        worker = self._workers.get(worker_id)
        if worker is None:
            slot = self._take_slot(worker_id)
            worker = self._workers[worker_id] = _Worker(slot=slot, bit=1 << slot, epoch=epoch, sequence_number=sequence_number)
        worker.epoch, worker.sequence_number = epoch, sequence_number
        new = set(hashes)
        self._remove(worker, worker.hashes - new)
        self._store(worker, new)

    def apply(self, worker_id: str, *, epoch: int, sequence_number: int, stored: Iterable[bytes], removed: Iterable[bytes]) -> bool:
        """Applies one event: `removed` first, then `stored`. False, and nothing changes, when it does not follow the last one known."""
        worker = self._workers.get(worker_id)
        if worker is None or (epoch, sequence_number) != (worker.epoch, worker.sequence_number + 1):
            return False
        worker.sequence_number = sequence_number
        self._remove(worker, worker.hashes.intersection(removed))
        self._store(worker, stored)
        return True

    def disown(self, worker_id: str, hashes: Iterable[bytes]) -> None:
        """Drops blocks that the worker was seen not to hold, so that nobody asks it for them again; a later event may bring them back."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            self._remove(worker, worker.hashes.intersection(hashes))

    def forget(self, worker_id: str) -> None:
        """Drops a worker that is gone."""
        worker = self._workers.pop(worker_id, None)
        if worker is not None:
            self._remove(worker, worker.hashes.copy())
            self._worker_ids[worker.slot] = None

    def match(self, hashes: Sequence[bytes]) -> list[Match]:
        """Who holds how many leading blocks, fewest first; workers without the first block are left out.

        Exact for a worker that holds no block of the prompt without those before it, which is how pools evict. Of any other it is true
        that it holds the last of the blocks counted, and not the one after.
        """
        matches: list[Match] = []
        holders, last = self._holders.get, len(hashes) - 1
        alive = holders(hashes[0], 0) if hashes else 0
        known = 0  # all of `alive` hold this block
        while alive:
            probe = min(known + STRIDE, last)
            still = alive & holders(hashes[probe], 0)
            if still == alive:
                if probe == last:
                    matches.append(Match(num_blocks=len(hashes), workers=alive))
                    break
                known = probe
                continue
            while probe - known > 1:  # somebody stops in between
                middle = (known + probe) // 2
                here = alive & holders(hashes[middle], 0)
                if here == alive:
                    known = middle
                else:
                    probe, still = middle, here
            matches.append(Match(num_blocks=probe, workers=alive ^ still))
            alive, known = still, probe
        return matches

    def workers_in(self, workers: int) -> Iterator[str]:
        """The ids of a bitmask's workers, by slot."""
        while workers:
            lowest = workers & -workers
            workers ^= lowest
            worker_id = self._worker_ids[lowest.bit_length() - 1]
            assert worker_id is not None
            yield worker_id

    def _take_slot(self, worker_id: str) -> int:
        if None in self._worker_ids:
            slot = self._worker_ids.index(None)
            self._worker_ids[slot] = worker_id
            return slot
        self._worker_ids.append(worker_id)
        return len(self._worker_ids) - 1

    def _store(self, worker: _Worker, hashes: Iterable[bytes]) -> None:
        bit, holders, held = worker.bit, self._holders, worker.hashes
        for block_hash in hashes:
            if block_hash not in held:
                others = holders.get(block_hash)
                holders[block_hash] = bit if others is None else others | bit
                held.add(block_hash)

    def _remove(self, worker: _Worker, held_hashes: Set[bytes]) -> None:
        bit, holders = worker.bit, self._holders
        worker.hashes -= held_hashes
        for block_hash in held_hashes:
            left = holders[block_hash] ^ bit
            if left:
                holders[block_hash] = left
            else:
                del holders[block_hash]
