"""Computes steps: a decoder, its KV pool and the sampler behind one call. The only part of the engine that touches tensors.

Knows nothing of queues; what it is given (a StepBatch and SampleRows) is plain data.
"""

import time
from collections.abc import Sequence

import torch

from services.core.types import SampledToken, TokenLogprobs
from services.engine.batch import StepBatch
from services.engine.models.decoder import Decoder
from services.engine.sampler import SampleRow, ScoreRow, sample, score


class ModelRunner:
    """Owns the pool, whose memory may come from outside. `model_s` is the time spent inside the decoder, for the books on overhead."""

    def __init__(self, decoder: Decoder, *, block_size: int, num_blocks: int, kv_buffer: memoryview | None = None) -> None:
        self.decoder = decoder
        self.layout = decoder.kv_layout(block_size)
        self.num_blocks = num_blocks
        if kv_buffer is None:
            self.pool = self.layout.allocate(num_blocks, torch.device("cpu"))
        else:
            self.pool = self.layout.over(kv_buffer, num_blocks)
        self.model_s = 0.0

    @torch.inference_mode()
    def execute(
        self, batch: StepBatch, samples: Sequence[SampleRow], scores: Sequence[ScoreRow] = ()
    ) -> tuple[list[SampledToken], list[TokenLogprobs]]:
        """Computes one step; chooses a token for each sample and gives the logprobs of each score's."""
        started = time.perf_counter()
        logits = self.decoder.forward(batch, self.pool, self.layout)
        self.model_s += time.perf_counter() - started
        return sample(logits, samples) if samples else [], score(logits, scores)
