"""What an engine counts. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Blocks of tokens, as whoever chooses a worker counts them: of the KV group that keeps all tokens.

    Without one, of the first group, with as many more free as the longest sequence has: a window takes a sequence of any length.
    """

    total: int
    free: int
    cached: int
    owned: int
    quarantined: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the start and gauges of now; blocks, of all KV groups together, obey free + cached + owned + quarantined == total.

    num_running                computed in each step
    num_reserved               wait for a peer to fill their blocks
    num_held                   prefilled here, their blocks being copied by others
    uncomputed_prompt_tokens   of requests without a first token that are computed here, running or waiting
    steps                      that computed something
    """

    num_running: int
    num_waiting: int
    num_reserved: int
    num_held: int
    uncomputed_prompt_tokens: int
    room: Room
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_owned: int
    blocks_quarantined: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    preemptions: int
    evictions: int
    partial_prefills: int
    largest_batch: int
    step_s: float
    model_s: float
