"""Norm, rotary embedding and SwiGLU against their specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import reference

DTYPES = [torch.float32, torch.bfloat16]
# Units in the last place of the larger operands: fp32 sums in another order; bf16 rounds once after each of up to three calls.
TOLERANCE = {torch.float32: 4 * 2.0**-23, torch.bfloat16: 3 * 2.0**-8}
SEEDS = st.integers(0, 2**31)


def randn(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def check_close(output: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> None:
    """Equal up to a few roundings of numbers as large as `size`."""
    assert output.dtype == expected.dtype
    assert output.shape == expected.shape
    assert ((output.float() - expected.float()).abs() <= TOLERANCE[expected.dtype] * size + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=SEEDS, num_tokens=st.integers(1, 9), width=st.integers(1, 130), scale=st.sampled_from([1e-4, 1.0, 1e4]))
@settings(deadline=None, max_examples=40)
def test_rms_norm_when_rows_are_any_equals_the_reference(dtype: torch.dtype, seed: int, num_tokens: int, width: int, scale: float) -> None:
    x, weight = randn(seed, num_tokens, width, dtype=dtype, scale=scale), randn(seed + 1, width, dtype=dtype)
    expected = reference.rms_norm(x, weight, 1e-5)
    check_close(kernels.rms_norm(x, weight, 1e-5), expected, expected.float().abs())


def test_rms_norm_of_heads_norms_each_head_by_itself() -> None:
    x, weight = randn(0, 5, 3, 16, dtype=torch.float32), randn(1, 16, dtype=torch.float32)
    output = kernels.rms_norm(x, weight, 1e-6)
    for head in range(3):
        assert torch.allclose(output[:, head], reference.rms_norm(x[:, head], weight, 1e-6), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_zeros_is_zeros(dtype: torch.dtype) -> None:
    assert not kernels.rms_norm(torch.zeros(2, 8, dtype=dtype), torch.ones(8, dtype=dtype), 1e-6).any()


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=SEEDS, num_tokens=st.integers(1, 7), heads=st.integers(1, 5), half_dim=st.integers(1, 65))
@settings(deadline=None, max_examples=40)
def test_apply_rope_when_heads_are_any_equals_the_reference(
    dtype: torch.dtype, seed: int, num_tokens: int, heads: int, half_dim: int
) -> None:
    x = randn(seed, num_tokens, heads, 2 * half_dim, dtype=dtype)
    angles = randn(seed + 1, num_tokens, half_dim, dtype=torch.float32, scale=3.0)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    whole_cos, whole_sin = torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]
    kept = x.clone()
    output = kernels.apply_rope(x, whole_cos, whole_sin)
    first, second = x.float().abs().chunk(2, dim=-1)
    size = (first + second).repeat(1, 1, 2)
    check_close(output, reference.apply_rope(x, cos, sin), size)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_rope_at_angle_zero_changes_nothing_and_a_quarter_turn_swaps_the_halves(dtype: torch.dtype) -> None:
    x = randn(3, 4, 2, 8, dtype=dtype)
    ones, zeros = torch.ones(4, 1, 8, dtype=dtype), torch.zeros(4, 1, 8, dtype=dtype)
    assert torch.equal(kernels.apply_rope(x, ones, zeros), x)
    signed = torch.cat((-ones[..., :4], ones[..., 4:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    assert torch.equal(kernels.apply_rope(x, zeros, signed), torch.cat((-second, first), dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=SEEDS, num_tokens=st.integers(1, 9), width=st.integers(1, 130), scale=st.sampled_from([1e-2, 1.0, 30.0]))
@settings(deadline=None, max_examples=40)
def test_silu_and_mul_when_rows_are_any_equals_the_reference(
    dtype: torch.dtype, seed: int, num_tokens: int, width: int, scale: float
) -> None:
    gate_up = randn(seed, num_tokens, 2 * width, dtype=dtype, scale=scale)
    kept = gate_up.clone()
    output = kernels.silu_and_mul(gate_up)
    expected = reference.silu_and_mul(gate_up)
    check_close(output, expected, expected.float().abs())
    assert torch.equal(gate_up, kept)


def test_silu_and_mul_when_gate_and_up_differ_takes_the_gate_from_the_first_half() -> None:
    assert kernels.silu_and_mul(torch.tensor([[0.0, 100.0, 3.0, 4.0]])).tolist() == [[0.0, 400.0]]
