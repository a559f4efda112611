"""The engine's steps on a GPU: a model in the shape of Llama 3 8B with random weights, its decode steps captured and launched one by one.

Needs torch, triton and numpy only, like gpu.py, whose lines these are.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch

from kernels import BackendName, backend_of
from services.engine.batch import GroupBatch, StepBatch
from services.engine.decode_graphs import Compute, DecodeGraphs, capture_graph
from services.engine.kv_groups import KVGroups
from services.engine.model_config import ModelConfig, parse_model_config
from services.engine.models.decoder import Decoder

STEPS = 15


class RandomWeights:
    """Gives weights as a WeightReader does, but none of a checkpoint."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self._dtype = device, dtype

    def read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(*shape, device=self.device, dtype=self._dtype)
        return torch.randn(*shape, device=self.device, dtype=self._dtype).mul_(shape[-1] ** -0.5)

    def skip(self, name: str) -> None:
        """There is nothing that could be left over."""

    def finish(self) -> None:
        """See skip."""


def model_config(*, tiny: bool) -> ModelConfig:
    sizes = (64, 96, 2, 4, 2, 256) if tiny else (4096, 14336, 32, 32, 8, 128256)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    raw = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192, "rope_theta": 500_000.0}
    return parse_model_config(raw | dict(zip(names, sizes, strict=True)), path="random weights")


class Steps:
    """Decode steps of `sequences` sequences with `context_len` tokens each."""

    def __init__(
        self, device: torch.device, *, sequences: int, context_len: int, tiny: bool, backend: BackendName = BackendName.TRITON
    ) -> None:
        dtype = torch.float32 if tiny else torch.bfloat16
        weights: Any = RandomWeights(device, dtype)
        self._device = device
        self._decoder = Decoder(model_config(tiny=tiny), weights, dtype=dtype, max_model_len=8192, backend=backend_of(backend))
        groups = KVGroups((None,), 16 if tiny else 64)
        (layout,) = self._layouts = self._decoder.kv_layouts(groups.block_size)
        self._block_size, blocks = groups.block_size, groups.num_blocks(context_len)
        self._pools = [layout.allocate(sequences * blocks + 1, device).normal_()]
        order = np.random.default_rng(0).permutation(sequences * blocks)
        self._tables = order.reshape(sequences, blocks)
        self._batch = self._spans([(index, context_len - 1, context_len) for index in range(sequences)])
        capture = capture_graph if device.type == "cuda" else _same
        self._graphs = DecodeGraphs(
            self._decoder, self._pools, self._layouts, groups, max_num_seqs=sequences, max_model_len=8192, capture=capture
        )

    def _spans(self, spans: Sequence[tuple[int, int, int]]) -> StepBatch:
        """Tokens start … end - 1 of each (sequence, start, end)."""
        positions = [np.arange(start, end) for _, start, end in spans]
        slots = [
            self._tables[sequence][seen // self._block_size] * self._block_size + seen % self._block_size
            for (sequence, _, _), seen in zip(spans, positions, strict=True)
        ]
        group = GroupBatch(
            slots=np.concatenate(slots),
            block_tables=[self._tables[sequence][: -(-end // self._block_size)].tolist() for sequence, _, end in spans],
            context_lens=[end for _, _, end in spans],
        )
        token_ids = [7 * seen % 251 + sequence for (sequence, _, _), seen in zip(spans, positions, strict=True)]
        query_lens = [end - start for _, start, end in spans]
        return StepBatch(
            token_ids=np.concatenate(token_ids),
            positions=np.concatenate(positions),
            query_lens=query_lens,
            groups=[group],
            logit_rows=np.arange(sum(query_lens)),
        )

    def logits(self, *spans: tuple[int, int, int]) -> torch.Tensor:
        """[T, V] of tokens start … end - 1 of each (sequence, start, end), whose keys and values are stored."""
        return self._decoder.forward(self._spans(spans), self._pools, self._layouts)

    def launched(self) -> torch.Tensor:
        """Logits of a step whose kernels are launched one by one."""
        return self._decoder.forward(self._batch, self._pools, self._layouts)

    def captured(self) -> torch.Tensor:
        """Logits of a step that is one launch."""
        return cast(torch.Tensor, self._graphs.run(self._batch))

    def seconds(self, step: Callable[[], torch.Tensor]) -> float:
        """Of one step, with all that the host does for it; median."""
        times = []
        for _ in range(STEPS if self._device.type == "cuda" else 1):
            started = time.perf_counter()
            step()[0, 0].item()  # until it is there
            times.append(time.perf_counter() - started)
        return statistics.median(times)


def _same(compute: Compute) -> Compute:
    return compute


@torch.inference_mode()
def check(device: torch.device, *, tiny: bool) -> Iterator[tuple[str, float]]:
    """Name and largest difference of logits."""
    steps = Steps(device, sequences=3, context_len=40 if tiny else 1000, tiny=tiny)
    launched, captured = steps.launched().clone(), steps.captured()
    yield "engine: captured steps", _difference(captured, launched, exact=False)
    del steps
    steps = Steps(device, sequences=2, context_len=40 if tiny else 3000, tiny=tiny, backend=BackendName.TRITON_INVARIANT)
    launched, captured = steps.launched().clone(), steps.captured()
    yield "engine: captured, invariant", _difference(captured, launched, exact=True)
    first, end = (20, 37) if tiny else (1100, 2600)
    whole = steps.logits((0, 0, end))
    cut = [steps.logits((0, 0, first)), steps.logits((1, 0, 1), (0, first, end - 1))[1:], steps.logits((1, 1, 2), (0, end - 1, end))[1:]]
    # In the interpreter products are the processor's library's, which gives a row other bits in another place of a tile.
    yield "engine: same bits however cut", _difference(torch.cat(cut), whole, exact=device.type == "cuda")


def _difference(found: torch.Tensor, expected: torch.Tensor, *, exact: bool) -> float:
    """The largest, as a part of the largest number; infinite where there must be none."""
    difference = float((found - expected).abs().max() / expected.abs().max())
    return float("inf") if difference and exact else difference


@torch.inference_mode()
def measure(device: torch.device, *, tiny: bool) -> Iterator[tuple[str, str]]:
    """Name and figure of each line."""
    context_len = 40 if tiny else 4096
    for sequences in (1, 32):
        steps = Steps(device, sequences=min(sequences, 2) if tiny else sequences, context_len=context_len, tiny=tiny)
        captured_s, launched_s = (steps.seconds(step) for step in (steps.captured, steps.launched))
        yield f"engine step, 8B bf16 B{sequences}/4k", f"{captured_s * 1e3:.2f} ms; launched one by one {launched_s * 1e3:.2f} ms"
        del steps  # two models at once are too much for some
    steps = Steps(device, sequences=2 if tiny else 32, context_len=context_len, tiny=tiny, backend=BackendName.TRITON_INVARIANT)
    yield "engine step, 8B bf16 B32/4k, invariant", f"{steps.seconds(steps.captured) * 1e3:.2f} ms"
