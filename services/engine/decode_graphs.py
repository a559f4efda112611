"""Steps that give every sequence one token, at a few fixed sizes: captured once, then replayed with other numbers in the same memory.

A step of few tokens is hundreds of short kernels; launched one by one, they take the processor longer than the GPU. A captured step is one
launch. Its tensors stay where they are: a batch is copied into them, and what it lacks to the captured size is filled up with sequences of
one token in a block that nobody owns. Lengths are read on the device, so that one capture serves all of them.
Source: CUDA graphs as vLLM and SGLang use them for decoding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels import KVLayout
from services.engine.batch import GroupBatch, StepBatch
from services.engine.kv_groups import KVGroups
from services.engine.models.decoder import Decoder, StepInputs

Compute = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _CapturedStep:
    """Its tensors, and what computes logits from them."""

    inputs: StepInputs
    compute: Compute


class DecodeGraphs:
    """Of a decoder that is_capturable, with Triton's backend, and its pools, whose last blocks are never handed out."""

    def __init__(
        self,
        decoder: Decoder,
        pools: Sequence[torch.Tensor],
        layouts: Sequence[KVLayout],
        groups: KVGroups,
        *,
        max_num_seqs: int,
        max_model_len: int,
        capture: Callable[[Compute], Compute],
    ) -> None:
        """Captures a step for each power of two below max_num_seqs, and for that.

        capture   makes of a computation one that does the same in the same memory: capture_graph
        """
        self._decoder = decoder
        self._spare_blocks = [len(pool) - 1 for pool in pools]
        self._block_size = groups.block_size
        self._captured: dict[int, _CapturedStep] = {}  # by number of sequences, ascending
        # Of a table: all blocks, or of a window those that are kept.
        longest = groups.num_blocks(max_model_len)
        widths = [min(longest, groups.most_blocks(group, 1) or longest) for group in range(len(pools))]
        for size in sorted({max_num_seqs, *(1 << power for power in range((max_num_seqs - 1).bit_length()))}):
            inputs = decoder.prepare(self._spare_batch(size, widths), pools, layouts)
            self._captured[size] = _CapturedStep(inputs, capture(lambda inputs=inputs: self._compute(inputs)))  # type: ignore[misc]

    def run(self, batch: StepBatch) -> torch.Tensor | None:
        """Logits [S, vocab_size] of a batch with one token for each sequence, until the next call; None: it is another kind of batch."""
        num_sequences = len(batch.query_lens)
        size = next((size for size in self._captured if size >= num_sequences), None)
        if size is None or len(batch.token_ids) != num_sequences or len(batch.logit_rows) != num_sequences:
            return None
        captured = self._captured[size]
        spare = self._spare_batch(size - num_sequences, [1] * len(self._spare_blocks))
        self._decoder.refill(captured.inputs, _joined(batch, spare))
        return captured.compute()[:num_sequences]

    def _compute(self, inputs: StepInputs) -> torch.Tensor:
        self._decoder.share_work(inputs)
        return self._decoder.compute(inputs)

    def _spare_batch(self, size: int, widths: Sequence[int]) -> StepBatch:
        """Sequences of one token each, in the block that nobody owns; tables of these widths."""
        groups = [
            GroupBatch(
                slots=np.full(size, block_id * self._block_size),
                block_tables=[[block_id] * width for _ in range(size)],
                context_lens=[1] * size,
            )
            for block_id, width in zip(self._spare_blocks, widths, strict=True)
        ]
        # On the CPU inputs share these arrays' memory: each is one of its own.
        token_ids, positions = (np.zeros(size, dtype=np.int64) for _ in range(2))
        return StepBatch(token_ids=token_ids, positions=positions, query_lens=[1] * size, groups=groups, logit_rows=np.arange(size))


def _joined(batch: StepBatch, other: StepBatch) -> StepBatch:
    groups = [
        GroupBatch(
            slots=np.concatenate((left.slots, right.slots)),
            block_tables=left.block_tables + right.block_tables,
            context_lens=left.context_lens + right.context_lens,
        )
        for left, right in zip(batch.groups, other.groups, strict=True)
    ]
    query_lens = batch.query_lens + other.query_lens
    return StepBatch(
        token_ids=np.concatenate((batch.token_ids, other.token_ids)),
        positions=np.concatenate((batch.positions, other.positions)),
        query_lens=query_lens,
        groups=groups,
        logit_rows=np.arange(len(query_lens)),
    )


def capture_graph(compute: Compute) -> Compute:
    """A computation on the current CUDA device as a graph; what it returns is overwritten by the next call."""
    # Twice before, beside the main stream: what is compiled or allocated at first must not become a part of the graph.
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = compute()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay
