"""Sequences on a paged pool without an engine: a test says which of their next tokens make the next step."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from services.engine.batch import GroupBatch, StepBatch
from services.engine.kv_groups import KVGroups
from services.engine.models.decoder import Decoder
from tests.checkpoints import FloatArray


class PagedSequences:
    """Sequences that share one pool, each with a table of shuffled block ids; computes any of their next tokens in one batch."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], *, block_size: int) -> None:
        self.prompts = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        self.num_computed = [0] * len(prompts)
        self._decoder, self._block_size = decoder, block_size
        counts = [-(-len(prompt) // block_size) for prompt in prompts]
        total = sum(counts) + 7
        self._groups = KVGroups(decoder.config.group_windows, block_size)
        self._layouts = decoder.kv_layouts(block_size)
        self._pools = [layout.allocate(total, torch.device("cpu")) for layout in self._layouts]
        starts = np.cumsum([0, *counts]).tolist()
        self._tables: list[list[list[int]]] = []  # by KV group
        for group, pool in enumerate(self._pools):
            # What a stranger left in a block must not matter.
            pool.view(torch.uint8).random_(0, 64, generator=torch.Generator().manual_seed(group))
            order = np.random.default_rng(1 + group).permutation(total).tolist()
            self._tables.append([order[start : start + count] for start, count in zip(starts, counts, strict=False)])

    def compute(self, num_tokens: Mapping[int, int], *, only_last: bool = False) -> dict[int, FloatArray]:
        """The next num_tokens[i] tokens of each sequence i in one step → their logits [num_tokens[i], V], or the last row's [1, V]."""
        order = sorted(num_tokens, key=lambda index: num_tokens[index] > 1)
        positions = [np.arange(self.num_computed[index], self.num_computed[index] + num_tokens[index]) for index in order]
        ends = np.cumsum([num_tokens[index] for index in order])
        batch = StepBatch(
            token_ids=np.concatenate([self.prompts[index][where] for index, where in zip(order, positions, strict=True)]),
            positions=np.concatenate(positions),
            query_lens=[num_tokens[index] for index in order],
            groups=[self._group_batch(group, order, positions) for group in range(len(self._pools))],
            logit_rows=ends - 1 if only_last else np.arange(ends[-1]),
        )
        with torch.inference_mode():
            logits = self._decoder.forward(batch, self._pools, self._layouts).numpy()
        for index in order:
            self.num_computed[index] += num_tokens[index]
        rows = np.split(logits, len(order) if only_last else ends[:-1])
        return dict(zip(order, rows, strict=True))

    def _group_batch(self, group: int, order: Sequence[int], positions: Sequence[npt.NDArray[np.int64]]) -> GroupBatch:
        size, slots, tables, context_lens = self._block_size, [], [], []
        for index, where in zip(order, positions, strict=True):
            table = self._tables[group][index]
            slots.append(np.asarray(table)[where // size] * size + where % size)
            first = self._groups.first_block(group, int(where[0]))
            tables.append(table[first:])
            context_lens.append(int(where[-1]) + 1 - first * size)
        return GroupBatch(slots=np.concatenate(slots), block_tables=tables, context_lens=context_lens)

    def compute_in_chunks(self, chunk_sizes: Sequence[int]) -> FloatArray:
        """All tokens of the only sequence, in chunks of these sizes (over and over) → logits [length, V]."""
        length = len(self.prompts[0])
        rows: list[FloatArray] = []
        while self.num_computed[0] < length:
            size = min(chunk_sizes[len(rows) % len(chunk_sizes)], length - self.num_computed[0])
            rows.append(self.compute({0: size})[0])
        return np.concatenate(rows)
