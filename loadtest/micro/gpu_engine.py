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

    def __init__(self, device: torch.device, *, sequences: int, context_len: int, tiny: bool) -> None:
        dtype = torch.float32 if tiny else torch.bfloat16
        weights: Any = RandomWeights(device, dtype)
        self._device = device
        self._decoder = Decoder(model_config(tiny=tiny), weights, dtype=dtype, max_model_len=8192, backend=backend_of(BackendName.TRITON))
        groups = KVGroups((None,), 16 if tiny else 64)
        (layout,) = self._layouts = self._decoder.kv_layouts(groups.block_size)
        blocks = groups.num_blocks(context_len)
        self._pools = [layout.allocate(sequences * blocks + 1, device).normal_()]
        order = np.random.default_rng(0).permutation(sequences * blocks).tolist()
        tables = [order[index * blocks : (index + 1) * blocks] for index in range(sequences)]
        cell = (context_len - 1) % groups.block_size
        group = GroupBatch(
            slots=np.array([table[-1] * groups.block_size + cell for table in tables]),
            block_tables=tables,
            context_lens=[context_len] * sequences,
        )
        self._batch = StepBatch(
            token_ids=np.arange(sequences),
            positions=np.full(sequences, context_len - 1),
            query_lens=[1] * sequences,
            groups=[group],
            logit_rows=np.arange(sequences),
        )
        capture = capture_graph if device.type == "cuda" else _same
        self._graphs = DecodeGraphs(
            self._decoder, self._pools, self._layouts, groups, max_num_seqs=sequences, max_model_len=8192, capture=capture
        )

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
    yield "engine: captured steps", float((launched - captured).abs().max() / launched.abs().max())


@torch.inference_mode()
def measure(device: torch.device, *, tiny: bool) -> Iterator[tuple[str, str]]:
    """Name and figure of each line."""
    for sequences in (1, 32):
        steps = Steps(device, sequences=min(sequences, 2) if tiny else sequences, context_len=40 if tiny else 4096, tiny=tiny)
        captured_s, launched_s = (steps.seconds(step) for step in (steps.captured, steps.launched))
        yield f"engine step, 8B bf16 B{sequences}/4k", f"{captured_s * 1e3:.2f} ms; launched one by one {launched_s * 1e3:.2f} ms"
        del steps  # two models at once are too much for some
