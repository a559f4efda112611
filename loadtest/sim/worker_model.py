"""How long a simulated worker's steps take, and how much it can hold: the facts of one kind of worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from loadtest.files import BadInput
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
    block_bytes           of one KV block; decides nothing while links are free
    overhead_s            what calls and wake-ups add to a first token; remote_overhead_s: more, when prefill computes the prompt
    """

    prefill: PrefillShape
    step: StepShape
    pools_chunks: bool
    block_size: int
    num_blocks: int
    chunk_tokens: int
    max_num_seqs: int
    decodes_first_token: bool
    block_bytes: int
    overhead_s: float = 0.0
    remote_overhead_s: float = 0.0

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
        block_bytes=512 << 17,  # of a model of 8 billion parameters: 128 KiB a token
    )


class FittedPrefill:
    """A step's constant, a cost per token, and one per pair of tokens that attend to each other: as `baton bench profile` fits it."""

    def __init__(self, seconds: tuple[float, float, float]) -> None:
        self._constant_s, self._per_token_s, self._per_pair_s = seconds

    def seconds(self, new_tokens: int, cached_tokens: int) -> float:
        return self._constant_s + new_tokens * (self._per_token_s + self._per_pair_s * (new_tokens + 2 * cached_tokens))

    def observe(self, new_tokens: int, cached_tokens: int, seconds: float, *, weight: float = 1.0) -> None:
        """Measured is measured."""


class FittedStep:
    """A constant, a cost per sequence, and one per KV block that is read."""

    def __init__(self, seconds: tuple[float, float, float]) -> None:
        self._constant_s, self._per_sequence_s, self._per_block_s = seconds

    def seconds(self, running: float, used_blocks: float, total_blocks: float) -> float:
        return self._constant_s + self._per_sequence_s * running + self._per_block_s * used_blocks

    def observe(self, running: float, used_blocks: float, total_blocks: float, seconds: float) -> None:
        """Measured is measured."""


Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]


class _FittedShape(msgspec.Struct, frozen=True, kw_only=True):
    seconds: tuple[Seconds, Seconds, Seconds]


class _Profile(msgspec.Struct, frozen=True, kw_only=True):
    format: Literal["baton.worker/1"]
    block_size: Positive
    num_blocks: Positive
    chunk_tokens: Positive
    max_num_seqs: Positive
    block_bytes: Positive
    prefill: _FittedShape
    decode: _FittedShape
    overhead_s: Seconds = 0.0
    remote_overhead_s: Seconds = 0.0


def fitted(path: Path) -> WorkerModel:
    """A worker as `baton bench profile` has measured it. Raises BadInput when the file cannot be read, or says what no worker does."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=_Profile)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise BadInput(f"{path}: {error}") from None
    for name, shape in (("prefill", profile.prefill), ("decode", profile.decode)):
        if not shape.seconds[0] + shape.seconds[1] > 0.0:
            raise BadInput(f"{path}: {name}.seconds are those of steps that take no time; the first two must not both be 0")
    return WorkerModel(
        prefill=FittedPrefill(profile.prefill.seconds),
        step=FittedStep(profile.decode.seconds),
        pools_chunks=False,
        block_size=profile.block_size,
        num_blocks=profile.num_blocks,
        chunk_tokens=profile.chunk_tokens,
        max_num_seqs=profile.max_num_seqs,
        decodes_first_token=False,
        block_bytes=profile.block_bytes,
        overhead_s=profile.overhead_s,
        remote_overhead_s=profile.remote_overhead_s,
    )
