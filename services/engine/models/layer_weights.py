"""The weights of one layer, read by their names in it and made into what computes with them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels import Linear
from services.engine.model_config import ModelConfig

if TYPE_CHECKING:
    from services.engine.weights import WeightReader  # needs a library that computing does not


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Names are those after "model.layers.<index>."; `dtype` is that of activations. Methods raise CheckpointError, see WeightReader.

    is_invariant   products are to be in batch-invariant mode, see Linear
    """

    config: ModelConfig
    reader: "WeightReader"
    index: int
    dtype: torch.dtype
    is_invariant: bool

    def read(self, name: str, *shape: int) -> torch.Tensor:
        """As stored."""
        return self.reader.read(f"model.layers.{self.index}.{name}", shape)

    def linear(self, module: str, parts: dict[str, int], in_features: int, *, bias: bool) -> Linear:
        """Several projections of the same input, by name and out_features, as one product."""
        weights = [self.read(f"{module}.{name}.weight", size, in_features) for name, size in parts.items()]
        biases = [self.read(f"{module}.{name}.bias", size) for name, size in parts.items()] if bias else []
        return self.linear_of(torch.cat(weights), torch.cat(biases) if bias else None)

    def linear_of(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None) -> Linear:
        """Of a weight that has been read; activations have dtype, or that of the others."""
        return Linear(weight, bias, dtype=dtype or self.dtype, is_invariant=self.is_invariant)

    def norm(self, name: str, size: int) -> torch.Tensor:
        return read_norm(self.config, self.reader, f"model.layers.{self.index}.{name}", size, self.dtype)


def read_norm(config: ModelConfig, reader: "WeightReader", name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """[size] what a norm multiplies by, in dtype."""
    weight = reader.read(f"{name}.weight", (size,))
    return (weight.float() + config.norm_offset).to(dtype) if config.norm_offset else weight.to(dtype)
