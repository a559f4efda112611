"""What compiled loops are made of: 16-bit floats as bits, and the power of two. Compiled anew each time, never from a cache."""

from typing import Any

import numba
import numpy as np
import pytest
import torch

from kernels.cpu_loops import as_array, exp2, narrow, wide


@numba.njit
def copy_elements(x: Any, output: Any) -> None:
    for i in range(len(x)):
        output[i] = narrow(wide(x[i]), output)


@numba.njit
def exp2_elements(x: Any, output: Any) -> None:
    for i in range(len(x)):
        output[i] = exp2(x[i])


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    output = torch.empty(x.shape, dtype=dtype)
    copy_elements(as_array(x), as_array(output))
    return output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_float_widens_to_its_value_and_narrows_back(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    widened = converted(every, torch.float32)
    assert torch.equal(widened.isnan(), every.isnan())
    finite = ~every.isnan()
    assert torch.equal(widened[finite], every.float()[finite])
    back = converted(widened, dtype)
    assert torch.equal(back.isnan(), every.isnan())
    assert torch.equal(back[finite].view(torch.int16), every[finite].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rounds_any_fp32_as_pytorch_does(dtype: torch.dtype) -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    ties = (bits & ~0xFFFF) | 0x8000  # exactly between two bf16 values
    x = torch.cat((bits, ties, ties + 1, ties - 1)).view(torch.float32)
    x = torch.cat((x, x.half().float() * (1 + 2.0**-11)))  # about halfway between two fp16 values
    expected, output = x.to(dtype), converted(x, dtype)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output[~expected.isnan()], expected[~expected.isnan()])


def test_exp2_is_within_two_units_in_the_last_place_and_held_to_its_bounds() -> None:
    x = np.linspace(-126, 126, 1_000_003, dtype=np.float32)
    output = np.empty_like(x)
    exp2_elements(x, output)
    expected = np.exp2(x.astype(np.float64))
    assert (np.abs(output - expected) / np.spacing(expected.astype(np.float32))).max() < 2
    edges = np.array([-np.inf, -1e9, -127, 0, 127, np.inf, np.nan], dtype=np.float32)
    output = np.empty_like(edges)
    exp2_elements(edges, output)
    assert output[:6].tolist() == [2.0**-126, 2.0**-126, 2.0**-126, 1.0, 2.0**126, 2.0**126]
    assert np.isnan(output[6])
