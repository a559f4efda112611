"""A sequence: one choice of one request while the engine works on it. State only; the scheduler moves it."""

import enum
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from services.core.prefix_hash import ROOT, chain_hashes, pack_tokens
from services.core.types import SamplingParams, TokenLogprobs
from services.engine.timing import PrefillWatch


class Purpose(enum.Enum):
    """What a sequence is here for; only what generates may be preempted, for others read or write the blocks of the rest."""

    GENERATE = "generate"  # its prompt is computed here, and all its tokens
    PREFILL = "prefill"  # its prompt and first tokens; then its blocks are held until somebody has copied them
    RECEIVE = "receive"  # its prompt's blocks are filled by somebody else, then it generates


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What is submitted to an engine.

    prefix_key         with whom its KV blocks may be shared (core/prefix_hash); None: the engine's own, for the model without a tenant
    output_token_ids   what another engine has generated already; the only choice goes on after them, as if it had been here all along
    """

    request_id: str
    prompt_token_ids: Tokens[int]
    sampling: SamplingParams
    prefix_key: bytes | None = None
    output_token_ids: Tokens[int] = ()

    @property
    def num_tokens(self) -> int:
        """That have to be computed before the next one can be chosen."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)


@dataclass(slots=True, eq=False)
class BlockTable:
    """A sequence's blocks in one KV group, from its block `first` on: earlier ones lie behind the group's window."""

    first: int
    block_ids: list[int]

    @property
    def end(self) -> int:
        """The first block that has no place yet."""
        return self.first + len(self.block_ids)


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One choice: its tokens, how many of them have keys and values, and the blocks that hold those.

    order           (arrival of the request, choice): who is served first and preempted last
    tokens          prompt and output; tokens[:num_computed] have K and V, as far as later ones see them
    tables          for each KV group the blocks that hold those; none while it waits
    block_hashes    hashes of the full blocks of `tokens`, as far as they have been needed
    num_readable    of a prefill for others: tokens whose blocks they can read already
    num_sealed      leading blocks whose content is published in the pools, as far as those have them
    watch           measures the prefill until the first token; None afterwards, and for further choices
    prompt_logprobs of the prompt's tokens but the first, as far as they have been computed; None: not asked for, or told already
    stop_ids        tokens that end the sequence
    """

    request_id: str
    choice: int
    order: tuple[int, int]
    tokens: list[int]
    prompt_length: int
    max_tokens: int
    sampling: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    prefix_key: bytes
    purpose: Purpose = Purpose.GENERATE
    num_computed: int = 0
    tables: list[BlockTable] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_sealed: int = 0
    num_readable: int = 0
    num_received: int = 0  # output tokens that another engine has made
    cached_tokens: int | None = None  # None until first admitted
    watch: PrefillWatch | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    def hash_full_blocks(self, block_size: int) -> list[bytes]:
        """Hashes of all full blocks of `tokens`; each is computed once."""
        known = len(self.block_hashes)
        if (known + 1) * block_size <= len(self.tokens):
            parent = self.block_hashes[-1] if known else ROOT
            packed = pack_tokens(self.tokens[known * block_size :])
            self.block_hashes.extend(chain_hashes(self.prefix_key, packed, block_size, parent=parent))
        return self.block_hashes
