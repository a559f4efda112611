"""Gumbel noise from Philox4x32-10 as whole-tensor integer arithmetic: bit-equal words on every device PyTorch runs on.

Specification: reference.gumbel_noise and services/core/noise.py.
"""

from collections.abc import Sequence

import torch

from services.core import noise

_LOW = 0xFFFFFFFF


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """[R, V] fp32 noise of rows (seed, position); the logarithms are taken in fp64 and rounded, so that libraries agree."""
    words = philox_words(seeds, positions, -(-vocab_size // noise.WORDS_PER_CALL), device)[:, :vocab_size]
    uniform = words.to(torch.float64).add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_().float()


def philox_words(seeds: Sequence[int], positions: Sequence[int], num_calls: int, device: torch.device) -> torch.Tensor:
    """[R, 4 * num_calls] int64 words 0 … 2**32 - 1 of the streams (seed, position), in counter order."""
    # int64 holds a 32 x 32 bit product exactly as a bit pattern: the high word is what a shift and a mask leave.
    k0 = torch.tensor([seed & _LOW for seed in seeds], device=device)[:, None]
    k1 = torch.tensor([seed >> 32 for seed in seeds], device=device)[:, None]
    c0 = torch.arange(num_calls, device=device).expand(len(seeds), -1)
    c1 = torch.tensor(list(positions), device=device)[:, None].expand(-1, num_calls)
    c2 = torch.zeros_like(c0)
    c3 = c2
    for round_index in range(noise.PHILOX_ROUNDS):
        product0 = c0 * noise.PHILOX_MULTIPLIERS[0]
        product1 = c2 * noise.PHILOX_MULTIPLIERS[1]
        key0 = (k0 + round_index * noise.PHILOX_WEYL[0]) & _LOW
        key1 = (k1 + round_index * noise.PHILOX_WEYL[1]) & _LOW
        c0 = (product1 >> 32).bitwise_and_(_LOW).bitwise_xor_(c1).bitwise_xor_(key0)
        c2 = (product0 >> 32).bitwise_and_(_LOW).bitwise_xor_(c3).bitwise_xor_(key1)
        c1 = product1.bitwise_and_(_LOW)
        c3 = product0.bitwise_and_(_LOW)
    return torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)
