"""Who holds which KV block: free, cached (kept for its content, taken back when room is short), owned or quarantined.

    free ──allocate──▶ owned ──release──▶ cached (if sealed) or free
    cached ──share──▶ owned            (same content, one more holder)
    cached ──allocate──▶ owned         (evicted: least recently used first)
    owned ──quarantine──▶ quarantined ──lift_quarantine──▶ free

    Invariant after every call: num_free + num_cached + num_owned + num_quarantined == num_blocks.

Whoever wants to tell others what the pool holds has it track its changes: which hashes can be found, and which no longer.
Blocks are numbers here; the tensor that they index is kv_layout's. Knows nothing of sequences or of time.
One thread calls it. Source: reference-counted hash blocks as in vLLM's automatic prefix caching (Kwon et al. 2023, SOSP).
"""

from collections import OrderedDict
from collections.abc import Sequence

from services.core.errors import OutOfBlocks


class BlockPool:
    """Bookkeeping of `num_blocks` blocks. All calls are all-or-nothing: one that raises has changed nothing."""

    def __init__(self, num_blocks: int, *, has_room_for_each: bool = False) -> None:
        """
        has_room_for_each   can_allocate() leaves a block for every holder of a block but one: whoever releases k blocks, shared ones too,
                            can then allocate k at once, as a window must that moves on
        """
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._has_room_for_each = has_room_for_each
        self._num_sharers = 0  # over all blocks, their holders but the first
        self._free = list(reversed(range(num_blocks)))  # a stack: what was freed last may still be in a processor's cache
        self._holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._quarantined: set[int] = set()
        # Hashes to be found, and no longer to be found, since the last drain_changes (in order: a block's after its parent's).
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}
        self._tracks_changes = False
        self.num_owned = 0
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    @property
    def num_available(self) -> int:
        """Blocks that allocate() could hand out now."""
        return len(self._free) + len(self._cached)

    def match_prefix(self, block_hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of the chain; they are not taken yet."""
        blocks = []
        for block_hash in block_hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds this content; it is not taken yet."""
        return self._block_of.get(block_hash)

    def can_allocate(self, num_blocks: int, *, shared: Sequence[int] = ()) -> bool:
        """Whether allocate(num_blocks) would succeed after share(shared), which takes cached blocks out of reach."""
        if self._has_room_for_each:
            # Each of `shared` is either out of reach then, or has a holder more.
            return num_blocks + len(shared) <= self.num_available - self._num_sharers
        return num_blocks <= self.num_available - sum(1 for block_id in shared if block_id in self._cached)

    def share(self, block_ids: Sequence[int]) -> None:
        """One more holder for blocks found by match_prefix or find."""
        for block_id in block_ids:
            assert self._hash_of[block_id] is not None
            if not self._holders[block_id]:
                del self._cached[block_id]
                self.num_owned += 1
            else:
                self._num_sharers += 1
            self._holders[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes blocks, evicting cached content when there are not enough free ones.

        Raises OutOfBlocks when free and cached together are too few.
        """
        if num_blocks > self.num_available:
            raise OutOfBlocks(f"need {num_blocks} KV blocks, {self.num_available} free")
        blocks = []
        for _ in range(num_blocks):
            if not self._free:
                self._evict_least_recent()
            block_id = self._free.pop()
            self._holders[block_id] = 1
            blocks.append(block_id)
        self.num_owned += num_blocks
        return blocks

    def seal(self, block_id: int, block_hash: bytes) -> None:
        """Names the content of a full owned block. When another block already carries that content, the first keeps the name."""
        assert self._holders[block_id] and self._hash_of[block_id] is None
        if block_hash not in self._block_of:
            self._hash_of[block_id] = block_hash
            self._block_of[block_hash] = block_id
            if self._tracks_changes:
                _change(block_hash, self._stored, undoes=self._removed)

    def release(self, block_ids: Sequence[int]) -> None:
        """One holder less. Pass a sequence's blocks in order: its tail is evicted before its head, which more prompts share."""
        for block_id in reversed(block_ids):
            assert self._holders[block_id] > 0
            self._holders[block_id] -= 1
            if self._holders[block_id]:
                self._num_sharers -= 1
                continue
            self.num_owned -= 1
            if self._hash_of[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

    def quarantine(self, block_ids: Sequence[int]) -> None:
        """Takes owned blocks out of circulation: a peer may still be writing into them."""
        for block_id in block_ids:
            assert self._holders[block_id] == 1 and self._hash_of[block_id] is None
            self._holders[block_id] = 0
            self.num_owned -= 1
            self._quarantined.add(block_id)

    def lift_quarantine(self, block_ids: Sequence[int]) -> None:
        """The writer is fenced: the blocks are free again."""
        for block_id in block_ids:
            self._quarantined.remove(block_id)
            self._free.append(block_id)

    def clear_cache(self) -> None:
        """Forgets all cached content that nobody holds."""
        while self._cached:
            self._evict_least_recent()

    def track_changes(self) -> None:
        """From now on drain_changes() tells; what the pool holds already counts as stored since."""
        self._tracks_changes = True
        self._stored = dict.fromkeys(self._block_of)
        self._removed = {}

    def drain_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes stored and removed since the last call; what came and went, or went and came back, is in neither."""
        stored, removed = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def _evict_least_recent(self) -> None:
        block_id, _ = self._cached.popitem(last=False)
        block_hash = self._hash_of[block_id]
        assert block_hash is not None
        del self._block_of[block_hash]
        self._hash_of[block_id] = None
        self._free.append(block_id)
        self.num_evictions += 1
        if self._tracks_changes:
            _change(block_hash, self._removed, undoes=self._stored)


def _change(block_hash: bytes, changes: dict[bytes, None], *, undoes: dict[bytes, None]) -> None:
    """Notes a change, or that it took back one that nobody has been told of yet."""
    if block_hash in undoes:
        del undoes[block_hash]
    else:
        changes[block_hash] = None
