"""Batch-invariant mode through whole models: logits and KV blocks have the same bits however prompts are cut and batched.

In Triton's interpreter: one sequence's tokens come a few at a time, beside another's, as chunks, cached prefixes and preemptions cut them.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import BackendName, backend_of, triton_attention, triton_backend, triton_invariant, triton_linear
from services.engine.batch import GroupBatch, StepBatch
from services.engine.kv_groups import KVGroups
from services.engine.model_config import load_model_config
from services.engine.models.decoder import Decoder
from services.engine.weights import WeightReader

pytestmark = pytest.mark.usefixtures("even_products", "short_parts")
BLOCK, LENGTH = 16, 45
TOKENS, OTHER_TOKENS = (np.random.default_rng(seed).integers(0, 300, LENGTH) for seed in (1, 2))


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's parts have two blocks, so that there are several."""
    monkeypatch.setattr(triton_attention, "INVARIANT_CHUNK", 2)


class Computed:
    """Two sequences, in blocks of their own order, computed step by step."""

    def __init__(self, decoder: Decoder, *, seed: int) -> None:
        self._decoder = decoder
        self._groups = KVGroups(decoder.config.group_windows, BLOCK)
        self._layouts = decoder.kv_layouts(BLOCK)
        blocks = self._groups.num_blocks(LENGTH)
        order = np.random.default_rng(seed).permutation(2 * blocks).tolist()
        self._tables = [order[:blocks], order[blocks:]]
        self._pools = [layout.allocate(2 * blocks, torch.device("cpu")) for layout in self._layouts]

    @torch.inference_mode()
    def step(self, *spans: tuple[int, int, int]) -> torch.Tensor:
        """Logits [T, V] of tokens start … end - 1 of each (sequence, start, end)."""
        tokens = [(TOKENS, OTHER_TOKENS)[sequence][start:end] for sequence, start, end in spans]
        positions = [np.arange(start, end) for _, start, end in spans]
        groups = []
        for group in range(len(self._pools)):
            slots, tables, contexts = [], [], []
            for (sequence, start, end), seen in zip(spans, positions, strict=True):
                table, first = self._tables[sequence], self._groups.first_kept(group, start)
                slots.append(np.array(table)[seen // BLOCK] * BLOCK + seen % BLOCK)
                tables.append(table[first : self._groups.num_blocks(end)])
                contexts.append(end - first * BLOCK)
            groups.append(GroupBatch(slots=np.concatenate(slots), block_tables=tables, context_lens=contexts))
        query_lens = [end - start for _, start, end in spans]
        batch = StepBatch(
            token_ids=np.concatenate(tokens),
            positions=np.concatenate(positions),
            query_lens=query_lens,
            groups=groups,
            logit_rows=np.arange(sum(query_lens)),
        )
        return self._decoder.forward(batch, self._pools, self._layouts)

    def blocks(self) -> list[torch.Tensor]:
        """Of the first sequence, in its order, of each KV group."""
        return [pool[self._tables[0]] for pool in self._pools]


@pytest.mark.parametrize("name", ["gemma3", "deepseek"])
def test_logits_and_blocks_have_the_same_bits_however_tokens_come(checkpoints: Path, name: str) -> None:
    config, reader = load_model_config(checkpoints / name), WeightReader(checkpoints / name)
    decoder = Decoder(config, reader, dtype=torch.float32, max_model_len=LENGTH, backend=backend_of(BackendName.TRITON_INVARIANT))
    whole = Computed(decoder, seed=0)
    expected = whole.step((0, 0, LENGTH))
    cut = Computed(decoder, seed=3)
    first = cut.step((0, 0, 21), (1, 0, 18))
    second = cut.step((1, 18, 19), (0, 21, LENGTH - 1))
    third = cut.step((0, LENGTH - 1, LENGTH))
    assert torch.equal(torch.cat((first[:21], second[1:], third)), expected)
    for blocks, expected_blocks in zip(cut.blocks(), whole.blocks(), strict=True):
        assert torch.equal(blocks, expected_blocks)
    # Computed again behind a prefix that is there, as after a preemption or on another worker.
    assert torch.equal(cut.step((0, 32, LENGTH)), expected[32:])


@pytest.mark.parametrize(("name", "ingredient"), [("gemma3", "attention"), ("gemma3", "products"), ("deepseek", "attention")])
def test_logits_without_one_part_of_the_mode_depend_on_how_tokens_come(
    checkpoints: Path, name: str, ingredient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above could not fail."""
    if ingredient == "attention":
        monkeypatch.setattr(triton_invariant, "plan_attention", triton_backend.plan_attention)
    else:
        monkeypatch.setattr(triton_linear, "linear", lambda x, weight, bias, dtype: F.linear(x, weight, bias).to(dtype))
    config, reader = load_model_config(checkpoints / name), WeightReader(checkpoints / name)
    decoder = Decoder(config, reader, dtype=torch.float32, max_model_len=LENGTH, backend=backend_of(BackendName.TRITON_INVARIANT))
    expected = Computed(decoder, seed=0).step((0, 0, LENGTH))
    cut = Computed(decoder, seed=0)
    cut.step((0, 0, LENGTH - 1))
    assert not torch.equal(cut.step((0, LENGTH - 1, LENGTH)), expected[-1:])
