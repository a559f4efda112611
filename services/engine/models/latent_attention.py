"""Multi-head latent attention: the KV cache has one small latent for each token, from which every head's keys and values can be computed.

A cell is [the latent, normed | the rotated part of the key]; both are for all heads. There are two ways to attend to it, with the same
result up to rounding, and a step takes for each sequence the one with less arithmetic (`is_cheaper_expanded`):

    absorbed    what would make keys of latents is applied to the query instead, and what would make values to what was read: attention
                itself is over latents, as they lie in the cache, with one KV head. For few new tokens
    expanded    keys and values of the whole context are computed from its latents, as stored, into a pool of their own: attention is over
                heads that are several times as narrow. For many new tokens, by which the expansion is shared

Source: DeepSeek-V2 (DeepSeek-AI 2024), section 2.1 and appendix C.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from kernels import Backend, KVLayout, Linear
from services.engine.latent_config import LatentConfig
from services.engine.models.attention import AttentionStep
from services.engine.models.layer_weights import LayerWeights

# Of the norms of both latents, whatever the configuration says of the others: so in DeepSeek's code and in transformers.
NORM_EPS = 1e-6
# Of expanded keys and values, with what they are copied from, but not what a backend may copy of them. Where all heads of a context need
# more, a few at a time are expanded.
EXPANDED_BYTES = 256 << 20
# New tokens that attend together when absorbed. A tile of more rows, each as wide as a latent, does not fit into a GPU's registers; so a
# longer run of them is taken for several sequences, each of which sees 16 tokens more than the one before it.
ABSORBED_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsorbedPlan:
    """Rows start … end of the queries are of sequences that attend to latents; plan is the backend's."""

    start: int
    end: int
    plan: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandedPlan:
    """Rows start … end of the queries are of one sequence, whose blocks are expanded into a pool of `layout`; plan is the backend's.

    blocks   [n] int64 ids; the expanded pool has as many
    layout   its KV heads are the heads that are expanded at once, a divisor of all
    """

    start: int
    end: int
    plan: Any
    blocks: torch.Tensor
    layout: KVLayout


class LatentAttention:
    """One layer's. Stored queries [T, Hq, D] are [plain | rotated] numbers of each head, before anything is absorbed."""

    def __init__(self, weights: LayerWeights, rope: tuple[torch.Tensor, torch.Tensor]) -> None:
        """rope: cos and sin as rope_tables makes them."""
        config, latent = weights.config, weights.config.latent
        assert latent is not None
        hidden_size, num_heads, bias = config.hidden_size, config.num_heads, config.qkv_bias
        self._num_heads, self._latent, self._scale = num_heads, latent, config.score_scale
        self._cos, self._sin = rope
        self._query_latent: Linear | None = None
        query_name, query_in = "self_attn.q_proj", hidden_size
        if latent.query_rank is not None:
            self._query_latent = weights.linear("self_attn", {"q_a_proj": latent.query_rank}, hidden_size, bias=bias)
            self._query_norm = weights.norm("self_attn.q_a_layernorm", latent.query_rank)
            query_name, query_in = "self_attn.q_b_proj", latent.query_rank
        query = weights.read(f"{query_name}.weight", num_heads * latent.query_dim, query_in)
        self._query = weights.linear_of(_in_halves(query, num_heads, latent.rope_dim))
        name = "self_attn.kv_a_proj_with_mqa"
        cell = _in_halves(weights.read(f"{name}.weight", latent.cell_numbers, hidden_size), 1, latent.rope_dim)
        cell_bias = _in_halves(weights.read(f"{name}.bias", latent.cell_numbers), 1, latent.rope_dim) if bias else None
        self._cell = weights.linear_of(cell, cell_bias)
        self._norm = weights.norm("self_attn.kv_a_layernorm", latent.rank)
        # [Hq, plain + value, rank]. Not a Linear: absorbed, it is multiplied from its other side.
        up = weights.read("self_attn.kv_b_proj.weight", num_heads * (latent.plain_dim + latent.value_dim), latent.rank)
        self._up = up.to(weights.dtype).view(num_heads, -1, latent.rank)
        self.output = weights.linear("self_attn", {"o_proj": hidden_size}, num_heads * latent.value_dim, bias=config.output_bias)

    def plan(
        self,
        backend: Backend,
        *,
        block_tables: Sequence[Sequence[int]],
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        layout: KVLayout,
        device: torch.device,
    ) -> list[AbsorbedPlan | ExpandedPlan]:
        sequences = zip(block_tables, query_lens, context_lens, strict=True)
        plans: list[AbsorbedPlan | ExpandedPlan] = []
        start = 0

        def is_expanded(sequence: tuple[Sequence[int], int, int]) -> bool:
            # The two ways round differently: in batch-invariant mode all tokens go the one that is always there.
            return not backend.INVARIANCE and is_cheaper_expanded(self._latent, sequence[1], sequence[2])

        for expanded, group in groupby(sequences, is_expanded):
            if expanded:
                for table, query_len, context_len in group:
                    plans.append(self._plan_expanded(backend, table, start, query_len, context_len, layout, device))
                    start += query_len
                continue
            tables, lens, contexts = [], [], []
            for table, query_len, context_len in group:
                for first in range(0, query_len, ABSORBED_TOKENS):
                    lens.append(min(ABSORBED_TOKENS, query_len - first))
                    contexts.append(context_len - query_len + first + lens[-1])
                    tables.append(table[: -(-contexts[-1] // layout.block_size)])
            plan = backend.plan_attention(
                block_tables=tables, query_lens=lens, context_lens=contexts, layout=layout, num_heads=self._num_heads, device=device
            )
            plans.append(AbsorbedPlan(start=start, end=start + sum(lens), plan=plan))
            start += sum(lens)
        return plans

    def _plan_expanded(
        self,
        backend: Backend,
        table: Sequence[int],
        start: int,
        query_len: int,
        context_len: int,
        layout: KVLayout,
        device: torch.device,
    ) -> ExpandedPlan:
        latent = self._latent
        num_blocks = -(-context_len // layout.block_size)
        copied = latent.plain_dim + latent.value_dim
        head_bytes = num_blocks * layout.block_size * (copied + latent.query_dim + latent.value_dim) * layout.dtype.itemsize
        most_heads = max(1, EXPANDED_BYTES // head_bytes)
        num_heads = max(count for count in range(1, self._num_heads + 1) if self._num_heads % count == 0 and count <= most_heads)
        expanded = KVLayout(
            num_layers=1,
            num_kv_heads=num_heads,
            block_size=layout.block_size,
            head_dim=latent.query_dim,
            value_head_dim=latent.value_dim,
            dtype=layout.dtype,
        )
        plan = backend.plan_attention(
            block_tables=[range(num_blocks)],
            query_lens=[query_len],
            context_lens=[context_len],
            layout=expanded,
            num_heads=num_heads,
            device=device,
        )
        blocks = torch.tensor(table[:num_blocks], device=device)
        return ExpandedPlan(start=start, end=start + query_len, plan=plan, blocks=blocks, layout=expanded)

    def store(self, normed: torch.Tensor, step: AttentionStep, layer: int) -> torch.Tensor:
        backend = step.backend
        query_input = normed
        if self._query_latent is not None:
            query_input = backend.rms_norm(self._query_latent(normed), self._query_norm, NORM_EPS)
        query = self._query(query_input).view(len(normed), self._num_heads, -1)
        backend.rope_and_write_latent(
            query,
            self._cell(normed),
            step.pool,
            step.layout,
            layer,
            positions=step.positions,
            slots=step.slots,
            cos=self._cos,
            sin=self._sin,
            norm=self._norm,
            eps=NORM_EPS,
        )
        return query

    def attend(self, query: torch.Tensor, step: AttentionStep, layer: int) -> torch.Tensor:
        parts = []
        for plan in step.plan:
            attend = self._attend_absorbed if isinstance(plan, AbsorbedPlan) else self._attend_expanded
            parts.append(attend(query[plan.start : plan.end], step, layer, plan))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_absorbed(self, query: torch.Tensor, step: AttentionStep, layer: int, plan: AbsorbedPlan) -> torch.Tensor:
        plain, rotated = query.tensor_split([self._latent.plain_dim], dim=-1)
        key_up, value_up = self._up.tensor_split([self._latent.plain_dim], dim=1)  # [Hq, …, rank]
        absorbed = step.backend.batched_linear(plain.transpose(0, 1), key_up.transpose(1, 2)).transpose(0, 1)
        attended = step.backend.paged_attention(torch.cat((absorbed, rotated), dim=-1), step.pool, layer, plan.plan, scale=self._scale)
        return step.backend.batched_linear(attended.transpose(0, 1), value_up).transpose(0, 1).flatten(1)

    def _attend_expanded(self, query: torch.Tensor, step: AttentionStep, layer: int, plan: ExpandedPlan) -> torch.Tensor:
        latent, layout = self._latent, plan.layout
        latents, rotated = step.pool[plan.blocks, layer, 0].tensor_split([latent.rank], dim=-1)  # [n, block_size, …]
        pool = torch.empty(len(plan.blocks), *layout.block_shape, dtype=layout.dtype, device=step.pool.device)
        keys, rotated_keys, values = pool[:, 0].tensor_split([latent.plain_dim, latent.query_dim], dim=-1)  # [n, heads, block_size, …]
        rotated_keys.copy_(rotated[:, None])
        parts = []
        for first in range(0, self._num_heads, layout.num_kv_heads):
            heads = slice(first, first + layout.num_kv_heads)
            up = F.linear(latents, self._up[heads].flatten(0, 1)).view(*latents.shape[:2], layout.num_kv_heads, -1).transpose(1, 2)
            keys.copy_(up[..., : latent.plain_dim])
            values.copy_(up[..., latent.plain_dim :])
            parts.append(step.backend.paged_attention(query[:, heads].contiguous(), pool, 0, plan.plan, scale=self._scale))
        return torch.cat(parts, dim=1).flatten(1) if len(parts) > 1 else parts[0].flatten(1)


def is_cheaper_expanded(latent: LatentConfig, query_len: int, context_len: int) -> bool:
    """Whether query_len new tokens attend to context_len, themselves included, with fewer multiplications expanded than absorbed.

    For each head: a token that a query sees costs a score and a weighted value, as wide as a cell and a latent when absorbed, as a key and
    a value when expanded: 1,088 or 320 multiplications for DeepSeek-V2. Keys and values are rank * (plain + value) away from latents,
    131,072: for the new tokens when absorbed, for the whole context when expanded. So a new prompt is always expanded, and after a long
    prefix it pays from 171 new tokens on. Measured on one core with V2-Lite's sizes and 4,000 tokens in all: 171 new ones take 1.13 s
    absorbed and 1.33 s expanded (two layers, their MLPs included), 300 take 1.97 s and 1.59 s.
    """
    seen = query_len * context_len - query_len * (query_len - 1) // 2
    saved = seen * (2 * latent.rank - latent.plain_dim - latent.value_dim)
    return query_len > 1 and saved > (context_len - query_len) * latent.rank * (latent.plain_dim + latent.value_dim)


def _in_halves(rows: torch.Tensor, num_heads: int, rope_dim: int) -> torch.Tensor:
    """Weight [num_heads * D, …] or bias of a projection whose heads end with rope_dim rotated numbers, with those in another order.

    DeepSeek rotates pairs (2i, 2i + 1), the kernels (i, i + rope_dim / 2), by the same angles. A score is a sum over pairs: where the
    numbers of queries and of keys are moved alike, it stays what it was. So this is done to the weights, once.
    """
    head_dim = len(rows) // num_heads
    plain, rotated = rows.view(num_heads, head_dim, *rows.shape[1:]).tensor_split([head_dim - rope_dim], dim=1)
    return torch.cat((plain, rotated[:, 0::2], rotated[:, 1::2]), dim=1).flatten(0, 1)
