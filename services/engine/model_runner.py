"""Computes steps: a decoder, its KV pools and the sampler behind one call. The only part of the engine that touches tensors.

On a GPU the pools are in its memory, and `kv_buffer`, where others read and write blocks, is a copy of as many blocks in the host's: what
others are to read is copied there first (copy_out), what they wrote from there (copy_in). On the CPU both are one.

Knows nothing of queues; what it is given (a StepBatch and SampleRows) is plain data.
"""

import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import accumulate

import torch

from services.core.types import SampledToken, TokenLogprobs
from services.engine.batch import StepBatch
from services.engine.decode_graphs import Compute, DecodeGraphs
from services.engine.kv_groups import KVGroups
from services.engine.models.decoder import Decoder
from services.engine.sampler import SampleRow, ScoreRow, sample, score


class ModelRunner:
    """Owns the pools. `model_s` is the time spent inside the decoder, for the books on overhead."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        block_size: int,
        num_blocks: Sequence[int],
        kv_buffer: memoryview | None = None,
        is_staged: bool | None = None,
    ) -> None:
        """
        num_blocks   of each KV group's pool
        kv_buffer    memory from outside, for one pool after another
        is_staged    whether blocks are copied between pools and kv_buffer; None: where the pools cannot be there
        """
        self.decoder = decoder
        self.groups = KVGroups(decoder.config.group_windows, block_size)
        self.layouts = decoder.kv_layouts(block_size)
        self.num_blocks = list(num_blocks)
        # The first number of each pool's blocks, where blocks are numbered through all pools.
        self.first_ids = [0, *accumulate(num_blocks)][:-1]
        self._outside: list[torch.Tensor] = []
        start = 0
        for layout, number in zip(self.layouts, num_blocks, strict=True):
            if kv_buffer is not None:
                self._outside.append(layout.over(kv_buffer[start:], number))
                start += number * layout.block_bytes
        self.is_staged = kv_buffer is not None and (decoder.device.type != "cpu" if is_staged is None else is_staged)
        if kv_buffer is not None and not self.is_staged:
            self.pools = self._outside
        else:
            # One more block than there are, which nobody owns: for what fills a batch up.
            self.pools = [layout.allocate(number + 1, decoder.device) for layout, number in zip(self.layouts, num_blocks, strict=True)]
        if self.is_staged and decoder.device.type == "cuda":
            _pin(self._outside)
        self._graphs: DecodeGraphs | None = None
        self.model_s = 0.0

    @torch.inference_mode()
    def capture_decodes(self, *, max_num_seqs: int, max_model_len: int, capture: Callable[[Compute], Compute]) -> None:
        """From now on steps that give every sequence one token are replayed, where the model allows it; see DecodeGraphs."""
        if self.decoder.is_capturable:
            self._graphs = DecodeGraphs(
                self.decoder,
                self.pools,
                self.layouts,
                self.groups,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                capture=capture,
            )

    @property
    def trial_lengths(self) -> tuple[int, ...]:
        """Numbers of new tokens for which steps are compiled apart: kernels have tiles of several sizes, and beyond 16 are others."""
        return (1, 2, 4, 8, 16, 17) if self.decoder.device.type == "cuda" else (1,)

    def copy_out(self, blocks: Sequence[Sequence[int]]) -> None:
        """Others can read these blocks of each group's pool now, as they are there."""
        self._copy(blocks, self.pools, self._outside)

    def copy_in(self, blocks: Sequence[Sequence[int]]) -> None:
        """What others wrote into these blocks is in the pools now."""
        self._copy(blocks, self._outside, self.pools)

    def _copy(self, blocks: Sequence[Sequence[int]], sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """One launch for each group: pinned memory of the host is in the GPU's address space, and blocks lie where they do in the pool."""
        for block_ids, source, target, layout in zip(blocks, sources, targets, self.layouts, strict=True):
            if block_ids:
                where = torch.tensor(block_ids, dtype=torch.int32, device=self.decoder.device)
                self.decoder.backend.copy_blocks(source, layout, target, layout, source_blocks=where, target_blocks=where)
        self._wait()

    def _wait(self) -> None:
        """Until the device has done what it was told."""
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)

    def layout_fingerprint(self, model_fingerprint: bytes) -> bytes:
        """Equal where a block's bytes mean the same, in every group; see KVLayout.fingerprint.

        In batch-invariant mode: where they would be the same. Other GPUs multiply by other instructions, other compilers choose others.
        """
        if self.decoder.backend.INVARIANCE:
            device = self.decoder.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            digest = blake2b(digest_size=len(model_fingerprint), person=b"baton.invariant")
            digest.update(model_fingerprint + f"{name}, {self.decoder.backend.INVARIANCE}".encode())
            model_fingerprint = digest.digest()
        for layout in self.layouts:
            model_fingerprint = layout.fingerprint(model_fingerprint)
        return model_fingerprint

    @torch.inference_mode()
    def execute(
        self, batch: StepBatch, samples: Sequence[SampleRow], scores: Sequence[ScoreRow] = ()
    ) -> tuple[list[SampledToken], list[TokenLogprobs]]:
        """Computes one step; chooses a token for each sample and gives the logprobs of each score's."""
        started = time.perf_counter()
        logits = self._graphs.run(batch) if self._graphs else None
        if logits is None:
            logits = self.decoder.forward(batch, self.pools, self.layouts)
        self._wait()
        self.model_s += time.perf_counter() - started
        return sample(logits, samples) if samples else [], score(logits, scores)


def _pin(tensors: Sequence[torch.Tensor]) -> None:
    """Lets the GPU read and write this memory by itself."""
    for tensor in tensors:
        error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)  # type: ignore[no-untyped-call]
        assert int(error) == 0, f"cudaHostRegister: {error}"
