"""Norm, rotary embedding with the paged write, and SwiGLU on the CPU: one pass over the data and one call each.

PyTorch computes a norm in seven calls; at batch 1 the calls cost more than the arithmetic, and at batch 64 the passes do.
Specification: the functions of the same names in reference.
"""

import torch
import torch.nn.functional as F

from kernels import cpu_loops
from kernels.cpu_loops import as_array, launch
from kernels.kv_cells import write_cells
from kernels.kv_layout import KVFormat, KVLayout


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference.rms_norm."""
    output = torch.empty_like(x)
    launch(cpu_loops.rms_norm, len(x), x.nbytes, as_array(x), as_array(weight), eps, as_array(output))
    return output


def add_rms_norm(residual: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference.add_rms_norm."""
    output = torch.empty_like(residual)
    launch(
        cpu_loops.add_rms_norm, len(residual), residual.nbytes, as_array(residual), as_array(delta), as_array(weight), eps, as_array(output)
    )
    return output


def activate_and_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """See reference.activate_and_mul."""
    if activation == "gelu_tanh":
        gate, up = gate_up.float().chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up).to(gate_up.dtype)
    output = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    launch(cpu_loops.silu_and_mul, len(gate_up), gate_up.nbytes, as_array(gate_up), as_array(output))
    return output


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
    """See reference.rope_and_write_kv."""
    num_tokens, num_heads, head_dim = qkv.shape
    query = qkv.new_empty(num_tokens, num_heads - 2 * layout.num_kv_heads, head_dim)
    target, target_layer, target_slots = pool, layer, slots
    if layout.format is not KVFormat.PLAIN:
        # The loop stores plain numbers: into a block for them all, from which they are quantized.
        target = qkv.new_empty(1, 1, layout.num_kv_heads, num_tokens, 2 * head_dim)
        target_layer, target_slots = 0, torch.arange(num_tokens)
    no_norm = qkv.new_empty(0)
    launch(
        cpu_loops.rope_and_write_kv,
        num_tokens,
        qkv.nbytes,
        as_array(qkv),
        as_array(target),
        target_layer,
        positions.numpy(),
        target_slots.numpy(),
        cos.numpy(),
        sin.numpy(),
        as_array(no_norm if query_norm is None else query_norm),
        as_array(no_norm if key_norm is None else key_norm),
        eps,
        as_array(query),
    )
    if target is not pool:
        key, value = target[0, 0].transpose(0, 1).chunk(2, dim=-1)
        write_cells(pool, layout, layer, key, value, slots)
    return query


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
    """See reference.rope_and_write_latent."""
    latent, rotated = cell.float().tensor_split([layout.value_dim], dim=-1)
    cos, sin = cos.index_select(0, positions)[:, None], sin.index_select(0, positions)[:, None]
    latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + eps) * norm.float()
    key = torch.cat((latent[:, None], _rotated(rotated[:, None], cos, sin)), dim=-1)
    write_cells(pool, layout, layer, key, key, slots)
    query_rotated = query[..., query.shape[-1] - rotated.shape[-1] :]
    query_rotated.copy_(_rotated(query_rotated, cos, sin))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] by cos and sin [T, 1, D/2], in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
