"""The attention of a layer: what every kind of it does for the decoder, and grouped-query attention, the kind of most families.

Knows the step's cells and plan as it is given them, not whose they are. Source: Ainslie et al. 2023 (grouped queries).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kernels import Backend, KVLayout, Linear
from services.engine.models.layer_weights import LayerWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionStep:
    """A step of T tokens in one pool, for all layers whose keys and values are there.

    positions   [T] int64, index within the sequence
    slots       [T] int64, as in kv_cells.write_cells
    plan        made by these layers' Attention.plan
    """

    backend: Backend
    positions: torch.Tensor
    slots: torch.Tensor
    pool: torch.Tensor
    layout: KVLayout
    plan: Any


class Attention(Protocol):
    """One layer's. `layer` is its index in the pool; sequences with one new token come first.

    A step is: plan, once for all layers of a pool; then in each layer store, attend and output, where rows may be left out before.
    """

    output: Linear

    def plan(
        self,
        backend: Backend,
        *,
        block_tables: Sequence[Sequence[int]],
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        layout: KVLayout,
        device: torch.device,
    ) -> Any:
        """What attend does in every layer of the pool; arguments as in reference.paged_attention."""

    def store(self, normed: torch.Tensor, step: AttentionStep, layer: int) -> torch.Tensor:
        """normed [T, H] → rotated queries [T, Hq, D]; the tokens' keys and values are in the pool then."""

    def attend(self, query: torch.Tensor, step: AttentionStep, layer: int) -> torch.Tensor:
        """What store returned → what the heads read from the pool, [T, Hq * Dv]."""


class GroupedQueryAttention:
    """Query heads share the keys and values of a KV head, all in a window or none; q, k and v are one product."""

    def __init__(self, weights: LayerWeights, rope: tuple[torch.Tensor, torch.Tensor]) -> None:
        """rope: cos and sin as rope_tables makes them, of this layer's kind."""
        config = weights.config
        hidden_size, head_dim = config.hidden_size, config.head_dim
        query_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.qkv = weights.linear(
            "self_attn", {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}, hidden_size, bias=config.qkv_bias
        )
        self.output = weights.linear("self_attn", {"o_proj": hidden_size}, query_size, bias=config.output_bias)
        self.query_norm = weights.norm("self_attn.q_norm", head_dim) if config.qk_norm else None
        self.key_norm = weights.norm("self_attn.k_norm", head_dim) if config.qk_norm else None
        self._config = config
        self._window = config.windows[weights.index]
        self._cos, self._sin = rope

    def plan(
        self,
        backend: Backend,
        *,
        block_tables: Sequence[Sequence[int]],
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        layout: KVLayout,
        device: torch.device,
    ) -> Any:
        return backend.plan_attention(
            block_tables=block_tables,
            query_lens=query_lens,
            context_lens=context_lens,
            layout=layout,
            num_heads=self._config.num_heads,
            device=device,
            window=self._window,
            plain_scores=self._config.score_softcap is None,
        )

    def store(self, normed: torch.Tensor, step: AttentionStep, layer: int) -> torch.Tensor:
        return step.backend.rope_and_write_kv(
            self.qkv(normed).view(len(normed), -1, self._config.head_dim),
            step.pool,
            step.layout,
            layer,
            positions=step.positions,
            slots=step.slots,
            cos=self._cos,
            sin=self._sin,
            query_norm=self.query_norm,
            key_norm=self.key_norm,
            eps=self._config.rms_norm_eps,
        )

    def attend(self, query: torch.Tensor, step: AttentionStep, layer: int) -> torch.Tensor:
        config = self._config
        attended = step.backend.paged_attention(query, step.pool, layer, step.plan, scale=config.score_scale, softcap=config.score_softcap)
        return attended.flatten(1)
