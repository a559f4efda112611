"""Linear in every form against a product in fp64, and the choice between the forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.linear import Linear, WeightForm, choose_form, fits_half
from tests.kernels.conftest import SetThreads

HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
# What a 16-bit weight becomes under fp32 activations on one thread: processors without FBGEMM (ARM) take the plain product.
HALF_OR_TRANSPOSED = WeightForm.HALF if HAS_FBGEMM else WeightForm.TRANSPOSED
FORMS = [
    (torch.float32, torch.float32, WeightForm.TRANSPOSED),
    (torch.bfloat16, torch.float32, HALF_OR_TRANSPOSED),
    (torch.float16, torch.float32, HALF_OR_TRANSPOSED),
    (torch.float32, torch.bfloat16, WeightForm.PLAIN),
    (torch.bfloat16, torch.bfloat16, WeightForm.PLAIN),
    (torch.float16, torch.float16, WeightForm.PLAIN),
]


@pytest.fixture(autouse=True)
def one_thread(torch_threads: SetThreads) -> None:
    torch_threads(1)


def check_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    """Every element within what rounding in fp32 sums of K products (and of the output) can move it."""
    linear = Linear(weight, bias, dtype=dtype)
    output = linear(x)
    assert output.dtype == dtype
    assert output.shape == (len(x), len(weight))
    assert (linear.out_features, linear.in_features) == tuple(weight.shape)
    wide_weight = weight.to(dtype).double() if linear.form is WeightForm.PLAIN else weight.double()
    wide_bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.to(dtype).double()
    expected = x.double() @ wide_weight.t() + wide_bias
    size = x.double().abs() @ wide_weight.abs().t() + wide_bias.abs()
    error = (output.double() - expected).abs()
    # 2: a 16-bit output is rounded after the product and after the bias; 1e-6: fp16 has no fine steps below 6e-5
    rounding = 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert (error <= (weight.shape[1] + 2) * 2.0**-24 * size + rounding * size + (0.0 if dtype == torch.float32 else 1e-6)).all()
    return linear


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("weight_dtype", "dtype", "form"), FORMS)
def test_linear_in_every_form_equals_the_product_in_fp64(
    weight_dtype: torch.dtype, dtype: torch.dtype, form: WeightForm, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_tokens, out_features, in_features in [(1, 1, 1), (1, 64, 48), (3, 17, 33), (16, 96, 128), (65, 100, 7)]:
        weight = (torch.randn(out_features, in_features, generator=generator) * 0.05).to(weight_dtype)
        bias = torch.randn(out_features, generator=generator).to(weight_dtype) if with_bias else None
        x = torch.randn(num_tokens, in_features, generator=generator).to(dtype)
        assert check_product(x, weight, bias, dtype).form is form


@given(
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(1, 40),
    out_features=st.integers(1, 80),
    in_features=st.integers(1, 80),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    with_bias=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_linear_of_bf16_weights_when_shapes_and_sizes_are_any_equals_the_product_in_fp64(
    seed: int, num_tokens: int, out_features: int, in_features: int, scale: float, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out_features, in_features, generator=generator) * scale).bfloat16()
    bias = torch.randn(out_features, generator=generator).bfloat16() if with_bias else None
    check_product(torch.randn(num_tokens, in_features, generator=generator), weight, bias, torch.float32)


def test_linear_when_called_with_no_rows_returns_none() -> None:
    for weight_dtype, dtype, _ in FORMS:
        assert Linear(torch.ones(3, 4, dtype=weight_dtype), dtype=dtype)(torch.ones(0, 4, dtype=dtype)).shape == (0, 3)


def test_linear_when_the_checkpoint_s_tensor_changes_later_keeps_its_values() -> None:
    """TRANSPOSED and HALF own a copy; PLAIN in the checkpoint's own dtype may share its memory, which nobody writes."""
    for weight_dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(4, 4, dtype=weight_dtype)
        linear = Linear(weight, dtype=torch.float32)
        weight.zero_()
        assert linear(torch.ones(1, 4)).tolist() == [[4.0] * 4]


def test_choose_form_of_bf16_weights_on_one_thread_is_half_where_fbgemm_is() -> None:
    assert choose_form(torch.ones(4, 4, dtype=torch.bfloat16), torch.float32) is HALF_OR_TRANSPOSED


def test_choose_form_on_several_threads_is_transposed(torch_threads: SetThreads) -> None:
    torch_threads(2)
    assert choose_form(torch.ones(4, 4, dtype=torch.bfloat16), torch.float32) is WeightForm.TRANSPOSED


def test_choose_form_when_half_would_lose_the_weight_is_transposed() -> None:
    weight = torch.full((4, 4), 1e-9, dtype=torch.bfloat16)
    assert choose_form(weight, torch.float32) is WeightForm.TRANSPOSED
    check_product(torch.ones(1, 4), weight, None, torch.float32)


def test_choose_form_without_fbgemm_is_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none"])
    assert choose_form(torch.ones(4, 4, dtype=torch.bfloat16), torch.float32) is WeightForm.TRANSPOSED


def bf16(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("weight", "fits"),
    [
        (bf16([1.0, -3.25, 2.0**-14, 65280.0]), True),  # all exact
        (bf16([2.0**-17, -(2.0**-17) * 1.9921875]), True),  # the smallest with all eight bits
        (bf16([0.0, 0.0], [0.0, -0.0]), True),
        (bf16([1.0, 2.0**-25 * 1.5]), True),  # lost, but below one rounding of the row
        (bf16([0.0, 0.0], [2.0**-26, 0.0]), False),  # the row beside it is all zeros and must not hide it
        (bf16([1.0, 1.0], [2.0**-24 * 1.5, 2.0**-24]), False),  # nor must a large row
        (bf16([2.0**-20 * 1.9921875]), False),
        (bf16([1.0, 65536.0]), False),  # beyond fp16
        (bf16([1.0, -3e38]), False),  # so large that its square is beyond fp32
        (bf16([1e-25, 1e-25]), False),  # so small that their squares are
        (torch.tensor([[1e-7, 6e4]], dtype=torch.float16), True),
        (torch.tensor([[1.0, 0.5]]), False),  # fp32, though these would fit: most do not
        (torch.tensor([[1.0, 0.5]], dtype=torch.float64), False),
    ],
)
def test_fits_half_when_a_row_would_or_would_not_survive_says_so(weight: torch.Tensor, fits: bool) -> None:
    assert fits_half(weight) is fits


@given(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_fits_half_when_it_says_yes_then_no_product_can_tell(values: list[float]) -> None:
    weight = bf16(values)
    if fits_half(weight):
        error = (weight.double() - weight.half().double()).norm()
        assert error <= weight.double().norm() * 2.0**-23


def test_in_fp32_when_activations_have_16_bits_does_not_round_the_product() -> None:
    weight, x = torch.randn(300, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    product = Linear(weight, dtype=torch.float32).in_fp32(x)
    torch.testing.assert_close(product, x.float() @ weight.float().t(), rtol=1e-5, atol=1e-5)
    assert (product.bfloat16().float() != product).any()
