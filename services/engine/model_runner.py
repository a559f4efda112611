"""Computes steps: a decoder, its KV pools and the sampler behind one call. The only part of the engine that touches tensors.

Knows nothing of queues; what it is given (a StepBatch and SampleRows) is plain data.
"""

import time
from collections.abc import Sequence

import torch

from services.core.types import SampledToken, TokenLogprobs
from services.engine.batch import StepBatch
from services.engine.kv_groups import KVGroups
from services.engine.models.decoder import Decoder
from services.engine.sampler import SampleRow, ScoreRow, sample, score


class ModelRunner:
    """Owns the pools. `model_s` is the time spent inside the decoder, for the books on overhead."""

    def __init__(self, decoder: Decoder, *, block_size: int, num_blocks: Sequence[int], kv_buffer: memoryview | None = None) -> None:
        """
        num_blocks   of each KV group's pool
        kv_buffer    memory from outside, for one pool after another
        """
        self.decoder = decoder
        self.groups = KVGroups(decoder.config.group_windows, block_size)
        self.layouts = decoder.kv_layouts(block_size)
        self.num_blocks = list(num_blocks)
        self.pools: list[torch.Tensor] = []
        start = 0
        for layout, number in zip(self.layouts, num_blocks, strict=True):
            if kv_buffer is None:
                self.pools.append(layout.allocate(number, torch.device("cpu")))
            else:
                self.pools.append(layout.over(kv_buffer[start:], number))
                start += number * layout.block_bytes
        self.model_s = 0.0

    def layout_fingerprint(self, model_fingerprint: bytes) -> bytes:
        """Equal where a block's bytes mean the same, in every group; see KVLayout.fingerprint."""
        for layout in self.layouts:
            model_fingerprint = layout.fingerprint(model_fingerprint)
        return model_fingerprint

    @torch.inference_mode()
    def execute(
        self, batch: StepBatch, samples: Sequence[SampleRow], scores: Sequence[ScoreRow] = ()
    ) -> tuple[list[SampledToken], list[TokenLogprobs]]:
        """Computes one step; chooses a token for each sample and gives the logprobs of each score's."""
        started = time.perf_counter()
        logits = self.decoder.forward(batch, self.pools, self.layouts)
        self.model_s += time.perf_counter() - started
        return sample(logits, samples) if samples else [], score(logits, scores)
