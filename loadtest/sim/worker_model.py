"""How long a simulated worker's steps take, and how much it can hold: the facts of one kind of worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.router.cost_model import DeclaredPrefill, DeclaredStep, PrefillShape, StepShape


class Chunk(NamedTuple):
    """Part of a prompt computed in one step."""

    new_tokens: int
    tokens_before: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModel:
    """
    prefill, step         seconds of a step's prompt chunks, and of its decoding; both count when a step has both
    pools_chunks          chunks of several prompts in one step cost what one chunk of their sum would; else their sum, less the constants
    block_size            tokens of a KV block
    num_blocks            KV blocks of the pool
    chunk_tokens          prompt tokens computed in one step at most
    max_num_seqs          sequences that have blocks at the same time, at most
    decodes_first_token   a first token comes from decode's first step on the prompt that has landed; else prefill has it already
    """

    prefill: PrefillShape
    step: StepShape
    pools_chunks: bool
    block_size: int
    num_blocks: int
    chunk_tokens: int
    max_num_seqs: int
    decodes_first_token: bool

    def step_s(self, chunks: Sequence[Chunk], num_decoding: int, context_blocks: float) -> float:
        """Seconds of one step.

        context_blocks   that the decoding sequences read: blocks that are reserved, cached or of prompts being computed cost a step
                         nothing, and one that two sequences share is read twice
        """
        seconds = self.step.seconds(num_decoding, context_blocks, self.num_blocks) if num_decoding else 0.0
        if not chunks:
            return seconds
        if self.pools_chunks:
            return seconds + self.prefill.seconds(sum(chunk.new_tokens for chunk in chunks), 0)
        constant_s = self.prefill.seconds(0, 0)
        return seconds + constant_s + sum(self.prefill.seconds(chunk.new_tokens, chunk.tokens_before) - constant_s for chunk in chunks)


def declared() -> WorkerModel:
    """The model in which routers are compared: NVIDIA Dynamo's mocker has these curves as its default (version 1.6.1)."""
    return WorkerModel(
        prefill=DeclaredPrefill(constant_s=16.50142e-3, per_token_s=1.518344e-5, per_token_squared_s=4.209989e-10, chunk_tokens=8192),
        step=DeclaredStep(constant_s=5.74e-3, per_share_s=54.01e-3, per_share_squared_s=-25.74e-3),
        pools_chunks=True,
        block_size=512,
        num_blocks=2000,
        chunk_tokens=8192,
        max_num_seqs=256,
        decodes_first_token=True,
    )
