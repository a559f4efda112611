"""What an engine tells its callers. Values only.

Block ids in them are the numbers of blocks of all the engine's pools, one for each place of the prompt (KVGroups.places: block by block of
what is kept of it); the last blocks may be filled in part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.core.errors import EngineStopped
from services.core.types import PrefillTiming, SampledToken, TokenEvent

NO_BLOCK = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillProgress:
    """How far the prompt of a prefill is. The blocks before num_computed_tokens // block_size are complete, in the last event all are.

    num_computed_tokens   cached ones included
    block_ids             of all places of the prompt; NO_BLOCK for one that has none yet, behind the window that moves towards it
    cached_tokens         found in the prefix cache at admission
    first_tokens          in the last event: the first token of each choice; timing comes with it
    """

    request_id: str
    num_computed_tokens: int
    block_ids: tuple[int, ...]
    cached_tokens: int
    first_tokens: tuple[SampledToken, ...] | None
    timing: PrefillTiming | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """A request has its place and all blocks of its prompt, and waits for somebody to fill those from num_cached_tokens on.

    block_ids           of all places of the prompt

    num_cached_tokens   whole blocks that hold their content already; others share them, so nobody may write there
    queue_s             from submission to this
    reserved_at         when this was, on the engine's clock: time.perf_counter()
    """

    request_id: str
    block_ids: tuple[int, ...]
    num_cached_tokens: int
    queue_s: float
    reserved_at: float


Event = TokenEvent | PrefillProgress | Reserved | EngineStopped
# Called on the event loop with what one step, or one command, made for all requests of that (hashable) listener.
Listener = Callable[[Sequence[Event]], None]
# Called on the event loop with the hashes that the pool has stored and removed since the last call; no hash is in both.
OnBlocks = Callable[[list[bytes], list[bytes]], None]
