"""The MLP of a layer: what every kind of it does for the decoder, and the gated one. Source: Shazeer 2020 (SwiGLU, GEGLU)."""

from typing import Protocol

import torch

from kernels import Backend
from services.engine.models.layer_weights import LayerWeights


class Mlp(Protocol):
    def __call__(self, x: torch.Tensor, backend: Backend) -> torch.Tensor:
        """[T, H] → [T, H], each token by itself."""


class GatedMlp:
    """down(activation(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, weights: LayerWeights, module: str, size: int, *, bias: bool) -> None:
        """`module`: where the three projections are; `size`: numbers between them."""
        hidden_size = weights.config.hidden_size
        self._gate_up = weights.linear(module, {"gate_proj": size, "up_proj": size}, hidden_size, bias=bias)
        self._down = weights.linear(module, {"down_proj": hidden_size}, size, bias=bias)
        self._activation = weights.config.activation

    def __call__(self, x: torch.Tensor, backend: Backend) -> torch.Tensor:
        return self._down(backend.activate_and_mul(self._gate_up(x), self._activation))
