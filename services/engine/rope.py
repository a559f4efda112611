"""Rotary position tables: the angle of every position and pair, with the long-context scalings that checkpoints name.

Source: RoFormer (Su et al. 2021); Llama 3's banded scaling and YaRN (Peng et al. 2023) as in Hugging Face's modeling_rope_utils.
"""

import math

import torch

from services.engine.model_config import RopeConfig

CPU = torch.device("cpu")


def rope_tables(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position and pair, each [num_positions, head_dim / 2] fp32, times the attention factor of YaRN.

    Computed on the CPU: the same bits on every device.
    """
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(rope, head_dim))
    return (angles.cos() * rope.attention_factor).to(device), (angles.sin() * rope.attention_factor).to(device)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair, [head_dim / 2] fp32."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope.kind:
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(frequencies, rope)
        case "yarn":
            return _yarn(frequencies, rope, head_dim)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    assert rope.original_context and rope.low_freq_factor and rope.high_freq_factor
    turns = rope.original_context * frequencies / (2 * math.pi)  # within the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(frequencies / rope.factor, frequencies, smooth.clamp(0, 1))


def _yarn(frequencies: torch.Tensor, rope: RopeConfig, head_dim: int) -> torch.Tensor:
    assert rope.original_context and rope.beta_fast and rope.beta_slow

    def pair_with_turns(turns: float) -> float:
        assert rope.original_context
        return head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    return torch.lerp(frequencies, frequencies / rope.factor, ramp.clamp(0, 1))
