"""The specification of every kernel, in plain PyTorch with fp32 accumulation: slow, dense, easy to check by eye.

Tests hold each backend to these functions. Nothing here is called while serving.
"""

from collections.abc import Sequence

import torch

from services.core import noise


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


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 I], gate before up, → silu(gate) * up, [T, I]. Source: Shazeer 2020 (SwiGLU)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def write_kv(pool: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Stores key and value [T, Hk, D] of one layer in the cells `slots` [T] (block_id * block_size + offset) of the pool."""
    block_size = pool.shape[3]
    for token, slot in enumerate(slots.tolist()):
        pool[slot // block_size, layer, :, slot % block_size] = torch.cat((key[token], value[token]), dim=-1)


def rope_and_write_kv(
    qkv: torch.Tensor,
    pool: torch.Tensor,
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
    slots         as in write_kv
    query_norm    [D] weight of an rms_norm of every query head, and key_norm of every key head
    Returns the rotated queries [T, Hq, D].
    """
    num_kv_heads = pool.shape[2]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    query, key, value = qkv.float().tensor_split([num_heads, num_heads + num_kv_heads], dim=1)
    if query_norm is not None and key_norm is not None:
        query, key = rms_norm(query, query_norm, eps), rms_norm(key, key_norm, eps)
    write_kv(pool, layer, apply_rope(key, cos[positions], sin[positions]), value, slots)
    return apply_rope(query, cos[positions], sin[positions]).to(qkv.dtype)


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    *,
    block_tables: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of new tokens over the paged keys and values of their sequences.

    query         [T, Hq, D]: the new tokens of all sequences, one after another; sequence s has query_lens[s] of them
    pool          see kv_layout; cells 0 … context_lens[s] - 1 of block_tables[s] are written, the new tokens' included
    context_lens  tokens of each sequence, new ones included, so that its last query sits at position context_lens[s] - 1
    window        a token sees itself and the window - 1 tokens before it; None: all
    Returns [T, Hq, D] in query's dtype. Query head h reads KV head h // (Hq / Hk).
    """
    num_kv_heads, head_dim = pool.shape[2], query.shape[2]
    group = query.shape[1] // num_kv_heads
    outputs, start = [], 0
    for table, query_len, context_len in zip(block_tables, query_lens, context_lens, strict=True):
        blocks = pool[list(table), layer]  # [blocks, Hk, N, 2 D]
        cells = blocks.transpose(0, 1).flatten(1, 2)[:, :context_len].float()  # [Hk, C, 2 D]
        keys = cells[..., :head_dim].repeat_interleave(group, dim=0)
        values = cells[..., head_dim:].repeat_interleave(group, dim=0)
        queries = query[start : start + query_len].float().transpose(0, 1)  # [Hq, q, D]
        position = torch.arange(context_len - query_len, context_len)[:, None]
        distance = position - torch.arange(context_len)[None, :]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        scores = (queries @ keys.transpose(1, 2)) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append((weights @ values).transpose(0, 1))
        start += query_len
    return torch.cat(outputs).to(query.dtype)


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
