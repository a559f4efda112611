"""The specification of every kernel, in plain PyTorch with fp32 accumulation: slow, dense, easy to check by eye.

Tests hold each backend to these functions. Nothing here is called while serving.
"""

import math
from collections.abc import Sequence

import torch

from kernels.kv_cells import read_cells, write_cells
from kernels.kv_layout import KVLayout
from services.core import noise

LOG2_E = 1.4426950408889634


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., H] scaled to unit root mean square in fp32, times weight [H]; in x's dtype. Source: Zhang and Sennrich 2019."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def add_rms_norm(residual: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Adds delta to residual, in place and rounded to its dtype, and returns rms_norm of the sum; all [T, H]."""
    residual.copy_(residual.float() + delta.float())
    return rms_norm(residual, weight, eps)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + D/2) of every head: x [T, H, D], cos and sin [T, D/2]. Source: Su et al. 2021, in Llama's pairing."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None].float(), sin[:, None].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def activate_and_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[T, 2 I], gate before up, → activation(gate) * up, [T, I]. Source: Shazeer 2020 (SwiGLU, GEGLU).

    activation   "silu", or "gelu_tanh", the approximation of Hendrycks and Gimpel 2016
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "gelu_tanh":
        activated = 0.5 * gate * (1.0 + torch.tanh((2.0 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    else:
        activated = gate * torch.sigmoid(gate)
    return (activated * up).to(gate_up.dtype)


def rope_and_write_kv(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    layout: KVLayout,
    layer: int,
    *,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """From one layer's projections to its queries, with its keys and values stored: QK-norm where there is one, rotation, paged write.

    qkv           [T, Hq + 2 Hk, D]: query, key and value heads of each token
    positions     [T] int64, rows of cos and sin [P, D/2] fp32
    slots         as in kv_cells.write_cells
    query_norm    [D] weight of an rms_norm of every query head, and key_norm of every key head
    Returns the rotated queries [T, Hq, D].
    """
    num_kv_heads = layout.num_kv_heads
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    query, key, value = qkv.float().tensor_split([num_heads, num_heads + num_kv_heads], dim=1)
    if query_norm is not None and key_norm is not None:
        query, key = rms_norm(query, query_norm, eps), rms_norm(key, key_norm, eps)
    write_cells(pool, layout, layer, apply_rope(key, cos[positions], sin[positions]), value, slots)
    return apply_rope(query, cos[positions], sin[positions]).to(qkv.dtype)


def rope_and_write_latent(
    query: torch.Tensor,
    cell: torch.Tensor,
    pool: torch.Tensor,
    layout: KVLayout,
    layer: int,
    *,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
) -> None:
    """From one layer's projections to its queries and stored latents: the latent's norm, rotation, paged write.

    query        [T, Hq, D]: the last head_dim - value_dim numbers of each head are rotated in place, the others left as they are
    cell         [T, head_dim]: of each token value_dim numbers of latent, which are normed, and the rotated part of its key
    positions    [T] int64, rows of cos and sin [P, (head_dim - value_dim) / 2] fp32
    slots        as in kv_cells.write_cells; the layout is that of latents
    norm         [value_dim] weight of the rms_norm
    """
    latent, rotated = cell.float().tensor_split([layout.value_dim], dim=-1)
    angles = cos[positions], sin[positions]
    key = torch.cat((rms_norm(latent, norm, eps)[:, None], apply_rope(rotated[:, None], *angles)), dim=-1)
    write_cells(pool, layout, layer, key, key, slots)
    query_rotated = query[..., query.shape[-1] - rotated.shape[-1] :]
    query_rotated.copy_(apply_rope(query_rotated, *angles))


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    layout: KVLayout,
    layer: int,
    *,
    block_tables: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    ancestors: torch.Tensor | None = None,
    visible: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of new tokens over the paged keys and values of their sequences.

    query         [T, Hq, D]: the new tokens of all sequences, one after another; sequence s has query_lens[s] of them
    pool          see kv_layout; cells 0 … context_lens[s] - 1 of block_tables[s] are written, the new tokens' included
    context_lens  tokens of each sequence, new ones included, so that its last query sits at position context_lens[s] - 1
    window        a token sees itself and the window - 1 tokens before it; None: all
    softcap       scores become softcap * tanh(score / softcap)
    sinks         [Hq] scores of a token that every query sees and that has no value
    ancestors     [T] int64: the new tokens are nodes of a tree instead of a chain; bit i says that a node sees new token i (itself too).
                  A node's position is that of its parent plus one, so it is as far from the context as it has ancestors
    visible       for each sequence a mask [Hq, q, C], or one that broadcasts to it, of what may be seen as well; None: everything
    Returns [T, Hq, Dv] in query's dtype, and log2 of each query's sum of 2 ** (score * log2 e), [T, Hq] fp32. Query head h reads KV head
    h // (Hq / Hk). A query that sees nothing gives zeros and -inf.
    """
    group = query.shape[1] // layout.num_kv_heads
    outputs, log_sums, start = [], [], 0
    for index, (table, query_len, context_len) in enumerate(zip(block_tables, query_lens, context_lens, strict=True)):
        keys, values = (
            cells[:, :context_len].repeat_interleave(group, dim=0)
            for cells in read_cells(pool, layout, layer, table[: -(-context_len // layout.block_size)])
        )
        queries = query[start : start + query_len].float().transpose(0, 1)  # [Hq, q, D]
        prefix_len = context_len - query_len
        position, cell = torch.arange(prefix_len, context_len)[:, None], torch.arange(context_len)[None, :]
        hidden = cell > position
        if ancestors is not None:
            seen = ancestors[start : start + query_len, None] >> torch.arange(query_len)[None, :] & 1 == 1
            hidden = torch.cat((torch.zeros(query_len, prefix_len, dtype=torch.bool), ~seen), dim=1)
            position = prefix_len + seen.sum(1, keepdim=True) - 1
        if window is not None:
            hidden = hidden | (position - cell >= window)
        if visible is not None:
            hidden = hidden | ~visible[index]
        scores = (queries @ keys.transpose(1, 2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, query_len, 1)), dim=-1)
        log_sum = scores.logsumexp(-1)
        weights = (scores - log_sum.nan_to_num(neginf=0.0)[..., None]).exp()
        outputs.append((weights[..., :context_len] @ values).transpose(0, 1))
        log_sums.append(log_sum.transpose(0, 1) * LOG2_E)
        start += query_len
    return torch.cat(outputs).to(query.dtype), torch.cat(log_sums)


def merge_attention(outputs: Sequence[torch.Tensor], log_sums: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention over several parts of a context gives together: outputs [T, H, D], log sums [T, H] as paged_attention returns them."""
    together = torch.stack(list(log_sums)) / LOG2_E
    log_sum = together.logsumexp(0)
    weights = (together - log_sum.nan_to_num(neginf=0.0)).exp()
    merged = (torch.stack([output.float() for output in outputs]) * weights[..., None]).sum(0)
    return merged.to(outputs[0].dtype), log_sum * LOG2_E


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], vocab_size: int) -> torch.Tensor:
    """[R, V] fp32 Gumbel noise of rows (seed, position): -log(-log((word + 1/2) / 2**32)) in fp64, rounded. See core/noise."""
    rows = []
    for seed, position in zip(seeds, positions, strict=True):
        key = (seed & noise.MASK, seed >> 32)
        words: list[int] = []
        for call in range(-(-vocab_size // noise.WORDS_PER_CALL)):
            words.extend(noise.philox((call, position, 0, 0), key))
        rows.append(words[:vocab_size])
    uniform = (torch.tensor(rows, dtype=torch.float64) + 0.5) * 2.0**-32
    return (-(-uniform.log()).log()).float()
