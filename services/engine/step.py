"""From what the scheduler chose to what the model computes: a step's arrays, and the rows to sample with the sequences they belong to.

Reads sequences and changes none. Knows nothing of pools or of what becomes of a token.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.core.noise import choice_seed
from services.engine.batch import GroupBatch, StepBatch
from services.engine.sampler import SampleRow, ScoreRow
from services.engine.scheduler import ScheduledChunk
from services.engine.sequence import Sequence


def make_batch(chunks: List[ScheduledChunk], block_size: int) -> StepBatch:
    token_ids: list[int] = []
    positions: list[int] = []
    logit_rows: list[int] = []
    for chunk in chunks:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        end = start + chunk.num_tokens
        token_ids.extend(sequence.tokens[start:end])
        positions.extend(range(start, end))
        num_rows = _num_logit_rows(chunk)
        logit_rows.extend(range(len(token_ids) - num_rows, len(token_ids)))
    return StepBatch(
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        query_lens=[chunk.num_tokens for chunk in chunks],
        groups=[_group_batch(chunks, group, block_size) for group in range(len(chunks[0].sequence.tables))],
        logit_rows=np.array(logit_rows, dtype=np.int64),
    )


def _group_batch(chunks: List[ScheduledChunk], group: int, block_size: int) -> GroupBatch:
    slots: list[int] = []
    block_tables: list[list[int]] = []
    context_lens: list[int] = []
    for chunk in chunks:
        table = chunk.sequence.tables[group]
        skipped = table.first * block_size
        start = chunk.sequence.num_computed - skipped
        end = start + chunk.num_tokens
        if chunk.num_tokens == 1:
            slots.append(table.block_ids[start // block_size] * block_size + start % block_size)
        else:
            for block in range(start // block_size, -(-end // block_size)):
                first = table.block_ids[block] * block_size
                slots.extend(range(first + max(0, start - block * block_size), first + min(block_size, end - block * block_size)))
        # Blocks that are there for later tokens are left out: plans have room for what tables have.
        block_tables.append(table.block_ids[: -(-end // block_size)])
        context_lens.append(end)
    return GroupBatch(slots=np.array(slots, dtype=np.int64), block_tables=block_tables, context_lens=context_lens)


def trial_batch(positions: npt.NDArray[np.int64], num_groups: int, block_size: int) -> StepBatch:
    """The given positions of one sequence that owns the first blocks of each KV group, and the logits of the last."""
    context_len = int(positions[-1]) + 1
    group = GroupBatch(slots=positions, block_tables=[list(range(-(-context_len // block_size)))], context_lens=[context_len])
    return StepBatch(
        token_ids=np.zeros_like(positions),
        positions=positions,
        query_lens=[len(positions)],
        groups=[group] * num_groups,
        logit_rows=np.array([len(positions) - 1]),
    )


@dataclass(frozen=True, slots=True)
class StepRows:
    """What is wanted of a step's logits. `samplers` are the sequences of `samples`, `scored` those of `scores`, entry by entry."""

    samples: list[SampleRow]
    samplers: list[Sequence]
    scores: list[ScoreRow]
    scored: list[Sequence]


def step_rows(chunks: List[ScheduledChunk]) -> StepRows:
    """A sample for every sequence whose last token this step computes, and one for each further choice that starts there; a score for
    every token of a prompt whose logprobs are wanted."""
    rows = StepRows([], [], [], [])
    next_row = 0
    for chunk in chunks:
        sequence = chunk.sequence
        first_row, next_row = next_row, next_row + _num_logit_rows(chunk)
        if sequence.prompt_logprobs is not None:
            num_top = sequence.sampling.prompt_logprobs
            assert num_top is not None
            # Each position tells of the token after it.
            following = sequence.tokens[sequence.num_computed + 1 : sequence.num_computed + 1 + chunk.num_tokens]
            rows.scores.extend(ScoreRow(row, token_id, num_top) for row, token_id in enumerate(following, first_row))
            rows.scored.extend([sequence] * len(following))
        if chunk.num_tokens < sequence.num_uncomputed:
            continue
        group = [sequence]
        if sequence.choice == 0 and sequence.num_output_tokens == 0:
            group += further_choices(sequence)
        for member in group:
            rows.samples.append(_sample_row(member, next_row - 1))
            rows.samplers.append(member)
    return rows


def _num_logit_rows(chunk: ScheduledChunk) -> int:
    """Of the chunk's last tokens, how many have their logits looked at."""
    if chunk.sequence.prompt_logprobs is not None:
        return chunk.num_tokens
    return int(chunk.num_tokens == chunk.sequence.num_uncomputed)


def further_choices(first: Sequence) -> list[Sequence]:
    """Choices 1 … n - 1 of a request whose prompt is there for choice 0, and no token yet."""
    return [
        Sequence(
            request_id=first.request_id,
            choice=choice,
            order=(first.order[0], choice),
            tokens=list(first.tokens),
            prompt_length=first.prompt_length,
            max_tokens=first.max_tokens,
            sampling=first.sampling,
            seed=choice_seed(first.seed, choice),
            stop_ids=first.stop_ids,
            prefix_key=first.prefix_key,
            purpose=first.purpose,
            cached_tokens=first.cached_tokens,
        )
        for choice in range(1, first.sampling.n)
    ]


def _sample_row(sequence: Sequence, logit_row: int) -> SampleRow:
    held_back = sequence.stop_ids if sequence.num_output_tokens < sequence.sampling.min_tokens else frozenset[int]()
    return SampleRow(
        logit_row=logit_row,
        params=sequence.sampling,
        seed=sequence.seed,
        position=len(sequence.tokens),
        tokens=sequence.tokens,
        prompt_length=sequence.prompt_length,
        held_back=held_back,
    )
