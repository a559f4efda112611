"""Norm, rotary embedding with the paged write, and SwiGLU on the CPU: one pass over the data and one call each.

PyTorch computes a norm in seven calls; at batch 1 the calls cost more than the arithmetic, and at batch 64 the passes do.
Specification: the functions of the same names in reference.
"""

from typing import Any

import numpy as np
import torch

from kernels.jit import as_array, exp2, jit, launch, narrow, wide

_LOG2_E = 1.4426950408889634


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference.rms_norm."""
    output = torch.empty_like(x)
    launch(_rms_norm, len(x), x.nbytes, as_array(x), as_array(weight), eps, as_array(output))
    return output


def add_rms_norm(residual: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference.add_rms_norm."""
    output = torch.empty_like(residual)
    launch(_add_rms_norm, len(residual), residual.nbytes, as_array(residual), as_array(delta), as_array(weight), eps, as_array(output))
    return output


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See reference.silu_and_mul."""
    output = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    launch(_silu_and_mul, len(gate_up), gate_up.nbytes, as_array(gate_up), as_array(output))
    return output


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
    """See reference.rope_and_write_kv."""
    num_tokens, num_heads, head_dim = qkv.shape
    query = qkv.new_empty(num_tokens, num_heads - 2 * pool.shape[2], head_dim)
    no_norm = qkv.new_empty(0)
    launch(
        _rope_and_write_kv,
        num_tokens,
        qkv.nbytes,
        as_array(qkv),
        as_array(pool),
        layer,
        positions.numpy(),
        slots.numpy(),
        cos.numpy(),
        sin.numpy(),
        as_array(no_norm if query_norm is None else query_norm),
        as_array(no_norm if key_norm is None else key_norm),
        eps,
        as_array(query),
    )
    return query


@jit
def _rms_norm(begin: int, end: int, x: Any, weight: Any, eps: float, output: Any) -> None:
    width = x.shape[1]
    for row in range(begin, end):
        squares = np.float32(0)
        for i in range(width):
            squares += wide(x[row, i]) * wide(x[row, i])
        scale = np.float32(1 / np.sqrt(squares / np.float32(width) + np.float32(eps)))
        for i in range(width):
            output[row, i] = narrow(wide(x[row, i]) * scale * wide(weight[i]), output)


@jit
def _add_rms_norm(begin: int, end: int, residual: Any, delta: Any, weight: Any, eps: float, output: Any) -> None:
    width = residual.shape[1]
    for row in range(begin, end):
        squares = np.float32(0)
        for i in range(width):
            element = narrow(wide(residual[row, i]) + wide(delta[row, i]), residual)
            residual[row, i] = element
            squares += wide(element) * wide(element)
        scale = np.float32(1 / np.sqrt(squares / np.float32(width) + np.float32(eps)))
        for i in range(width):
            output[row, i] = narrow(wide(residual[row, i]) * scale * wide(weight[i]), output)


@jit
def _silu_and_mul(begin: int, end: int, gate_up: Any, output: Any) -> None:
    width = output.shape[1]
    for row in range(begin, end):
        for i in range(width):
            gate = wide(gate_up[row, i])
            sigmoid = np.float32(1) / (np.float32(1) + exp2(gate * np.float32(-_LOG2_E)))
            output[row, i] = narrow(gate * sigmoid * wide(gate_up[row, width + i]), output)


@jit
def _rope_and_write_kv(
    begin: int,
    end: int,
    qkv: Any,
    pool: Any,
    layer: int,
    positions: Any,
    slots: Any,
    cos: Any,
    sin: Any,
    query_norm: Any,
    key_norm: Any,
    eps: float,
    query: Any,
) -> None:
    num_kv_heads, block_size = pool.shape[2], pool.shape[3]
    num_query_heads, head_dim = query.shape[1], query.shape[2]
    half = head_dim // 2
    for token in range(begin, end):
        block, offset = divmod(slots[token], block_size)
        position_cos, position_sin = cos[positions[token]], sin[positions[token]]
        for head in range(num_query_heads + num_kv_heads):
            source = qkv[token, head]
            norm = query_norm if head < num_query_heads else key_norm
            target = query[token, head] if head < num_query_heads else pool[block, layer, head - num_query_heads, offset]
            scale = np.float32(1)
            if len(norm):
                squares = np.float32(0)
                for i in range(head_dim):
                    squares += wide(source[i]) * wide(source[i])
                scale = np.float32(1 / np.sqrt(squares / np.float32(head_dim) + np.float32(eps)))
            for i in range(half):
                first, second = wide(source[i]), wide(source[half + i])
                if len(norm):
                    first, second = first * scale * wide(norm[i]), second * scale * wide(norm[half + i])
                target[i] = narrow(first * position_cos[i] - second * position_sin[i], target)
                target[half + i] = narrow(second * position_cos[i] + first * position_sin[i], target)
        for head in range(num_kv_heads):
            source = qkv[token, num_query_heads + num_kv_heads + head]
            target = pool[block, layer, head, offset, head_dim:]
            for i in range(head_dim):
                target[i] = narrow(wide(source[i]), target)
