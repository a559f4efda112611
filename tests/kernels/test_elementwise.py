"""Norm, rotary embedding with the paged write, and SwiGLU against their specification."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import KVLayout, cpu_backend, reference
from tests.kernels.conftest import SetThreads

# Units in the last place: fp32 sums in another order; a 16-bit result is rounded once, and may fall on the other side of a tie.
TOLERANCE = {torch.float32: 4 * 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
DTYPES = list(TOLERANCE)
SEEDS = st.integers(0, 2**31)


def randn(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def check_close(output: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> None:
    """Equal up to a few roundings of numbers as large as `size`."""
    assert output.dtype == expected.dtype
    assert output.shape == expected.shape
    finfo = torch.finfo(expected.dtype)
    smallest = max(finfo.smallest_normal * finfo.eps, 1e-30)  # below its normal numbers a dtype's steps are all of this size
    assert ((output.float() - expected.float()).abs() <= TOLERANCE[expected.dtype] * size + smallest).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=SEEDS, num_tokens=st.integers(1, 9), width=st.integers(1, 130), scale=st.sampled_from([1e-4, 1.0, 1e4]))
@settings(deadline=None, max_examples=40)
def test_rms_norm_when_rows_are_any_equals_the_reference(dtype: torch.dtype, seed: int, num_tokens: int, width: int, scale: float) -> None:
    x, weight = randn(seed, num_tokens, width, dtype=dtype, scale=scale), randn(seed + 1, width, dtype=dtype)
    expected = reference.rms_norm(x, weight, 1e-5)
    check_close(cpu_backend.rms_norm(x, weight, 1e-5), expected, expected.float().abs())


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=SEEDS, num_tokens=st.integers(1, 9), width=st.integers(1, 130))
@settings(deadline=None, max_examples=40)
def test_add_rms_norm_when_rows_are_any_equals_the_reference(dtype: torch.dtype, seed: int, num_tokens: int, width: int) -> None:
    residual, delta, weight = (randn(seed + i, *shape, dtype=dtype) for i, shape in enumerate([(num_tokens, width)] * 2 + [(width,)]))
    expected_residual = residual.clone()
    expected = reference.add_rms_norm(expected_residual, delta, weight, 1e-5)
    output = cpu_backend.add_rms_norm(residual, delta, weight, 1e-5)
    check_close(output, expected, expected.float().abs())
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_zeros_is_zeros(dtype: torch.dtype) -> None:
    assert not cpu_backend.rms_norm(torch.zeros(2, 8, dtype=dtype), torch.ones(8, dtype=dtype), 1e-6).any()


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=SEEDS, num_tokens=st.integers(1, 7), kv_heads=st.integers(1, 3), group=st.integers(1, 3), half_dim=st.integers(1, 65))
@settings(deadline=None, max_examples=40)
def test_rope_and_write_kv_when_heads_are_any_equals_the_reference(
    dtype: torch.dtype, qk_norm: bool, seed: int, num_tokens: int, kv_heads: int, group: int, half_dim: int
) -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=kv_heads, block_size=16, head_dim=2 * half_dim, dtype=dtype)
    pool = randn(seed, 5, *layout.block_shape, dtype=dtype)
    expected_pool = pool.clone()
    qkv = randn(seed + 1, num_tokens, kv_heads * (group + 2), 2 * half_dim, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    angles = randn(seed + 2, 50, half_dim, dtype=torch.float32, scale=3.0)
    arguments: dict[str, Any] = {
        "positions": torch.randint(50, (num_tokens,), generator=generator),
        "slots": torch.randperm(5 * 16, generator=generator)[:num_tokens],
        "cos": angles.cos(),
        "sin": angles.sin(),
        "query_norm": randn(seed + 3, 2 * half_dim, dtype=dtype) if qk_norm else None,
        "key_norm": randn(seed + 4, 2 * half_dim, dtype=dtype) if qk_norm else None,
        "eps": 1e-6,
    }
    kept = qkv.clone()
    query = cpu_backend.rope_and_write_kv(qkv, pool, layout, 1, **arguments)
    expected = reference.rope_and_write_kv(qkv, expected_pool, layout, 1, **arguments)
    check_close(query, expected, max_of_pairs(expected))
    written = expected_pool[:, 1]
    check_close(
        pool[:, 1], written, torch.cat((max_of_pairs(written[..., : 2 * half_dim]), written[..., 2 * half_dim :].float().abs()), -1)
    )
    assert torch.equal(pool[:, [0, 2]], expected_pool[:, [0, 2]])
    assert torch.equal(qkv, kept)


def max_of_pairs(rotated: torch.Tensor) -> torch.Tensor:
    """The length of each rotated pair, which bounds what was rounded on the way to its parts."""
    first, second = rotated.float().chunk(2, dim=-1)
    return torch.hypot(first, second).repeat(*[1] * (rotated.ndim - 1), 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_at_angle_zero_changes_nothing_and_a_quarter_turn_swaps_the_halves(dtype: torch.dtype) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=1, block_size=16, head_dim=8, dtype=dtype)
    pool = layout.allocate(1, torch.device("cpu"))
    qkv = randn(3, 2, 3, 8, dtype=dtype)
    tables: dict[str, Any] = {"cos": torch.tensor([[1.0] * 4, [0.0] * 4]), "sin": torch.tensor([[0.0] * 4, [1.0] * 4])}
    query = cpu_backend.rope_and_write_kv(qkv, pool, layout, 0, positions=torch.tensor([0, 1]), slots=torch.tensor([5, 2]), **tables)
    turned = torch.cat((-qkv[..., 4:], qkv[..., :4]), dim=-1)
    assert torch.equal(query[:, 0], torch.stack((qkv[0, 0], turned[1, 0])))
    assert torch.equal(pool[0, 0, 0, 5], torch.cat((qkv[0, 1], qkv[0, 2])))
    assert torch.equal(pool[0, 0, 0, 2], torch.cat((turned[1, 1], qkv[1, 2])))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=SEEDS, num_tokens=st.integers(1, 9), width=st.integers(1, 130), scale=st.sampled_from([1e-2, 1.0, 30.0]))
@settings(deadline=None, max_examples=40)
def test_silu_and_mul_when_rows_are_any_equals_the_reference(
    dtype: torch.dtype, seed: int, num_tokens: int, width: int, scale: float
) -> None:
    gate_up = randn(seed, num_tokens, 2 * width, dtype=dtype, scale=scale)
    kept = gate_up.clone()
    output = cpu_backend.activate_and_mul(gate_up, "silu")
    expected = reference.activate_and_mul(gate_up, "silu")
    # One rounding of the gate is the gate's size times that in its exponential.
    check_close(output, expected, expected.float().abs() * (1 + gate_up[:, :width].float().abs()))
    assert torch.equal(gate_up, kept)


@pytest.mark.parametrize("name", ["rms_norm", "silu_and_mul"])
def test_a_call_shared_by_threads_gives_the_same_bits(torch_threads: SetThreads, name: str) -> None:
    x, weight = randn(0, 1801, 512, dtype=torch.float32), randn(1, 512, dtype=torch.float32)

    def compute() -> torch.Tensor:
        return cpu_backend.rms_norm(x, weight, 1e-5) if name == "rms_norm" else cpu_backend.activate_and_mul(x, "silu")

    torch_threads(1)
    alone = compute()
    torch_threads(3)
    assert torch.equal(compute(), alone)


def test_silu_and_mul_when_gates_are_extreme_saturates_and_keeps_nan() -> None:
    gate = torch.tensor([-1e30, -200.0, 200.0, 1e30, float("nan")])
    output = cpu_backend.activate_and_mul(torch.cat((gate, torch.ones(5)))[None], "silu")[0]
    assert output[:4].tolist() == pytest.approx([0.0, 0.0, 200.0, 1e30], rel=1e-6, abs=1e-5)
    assert output[4].isnan()


def test_silu_and_mul_when_gate_and_up_differ_takes_the_gate_from_the_first_half() -> None:
    assert cpu_backend.activate_and_mul(torch.tensor([[0.0, 100.0, 3.0, 4.0]]), "silu").tolist() == [[0.0, 400.0]]
