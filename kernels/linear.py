"""Matrix products with a fixed weight, in whichever form the processor multiplies fastest without changing the weight.

A bf16 weight on a processor without bf16 instructions is the interesting case: PyTorch would emulate them, at a quarter of the speed
of fp32. Such a weight is multiplied in fp32 instead, from a two-byte copy: every bf16 value of ordinary size is an fp16 value as well
(8 significant bits fit into 11), and FBGEMM multiplies fp32 activations by packed fp16 weights with fp32 accumulation. Decoding is bound
by the bytes of the weights, so two bytes instead of four are worth almost a factor of two.
"""

import enum
import threading
import warnings

import torch
import torch.nn.functional as F

_PACKING = threading.Lock()


class WeightForm(enum.Enum):
    """How a weight is kept. PLAIN: [N, K] in the compute dtype; INVARIANT: so as well. TRANSPOSED: [K, N] fp32. HALF: packed fp16."""

    PLAIN = "plain"
    INVARIANT = "invariant"
    TRANSPOSED = "transposed"
    HALF = "half"


class Linear:
    """y = x Wᵀ + b for x [T, K], W [N, K], b [N] or none. The output has x's dtype, which is the compute dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: torch.dtype, is_invariant: bool = False) -> None:
        """
        weight         in the checkpoint's dtype
        dtype          of the activations
        is_invariant   by Triton: a row has the same bits whatever rows are computed with it
        """
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.to(dtype)
        self.form = WeightForm.INVARIANT if is_invariant else choose_form(weight, dtype)
        match self.form:
            case WeightForm.PLAIN | WeightForm.INVARIANT:
                self._weight = weight.to(dtype).contiguous()
            case WeightForm.TRANSPOSED:
                self._weight = weight.to(dtype).t().contiguous()
            case WeightForm.HALF:
                self._weight = _pack_half(weight)

    def in_fp32(self, x: torch.Tensor) -> torch.Tensor:
        """The product in fp32, whatever x's dtype: sums are never rounded to 16 bits. On the CPU for weights made with dtype fp32."""
        if self.form is WeightForm.INVARIANT:
            return _invariant(x.to(self._weight.dtype), self._weight, self.bias, torch.float32)
        if x.is_cuda and x.dtype != torch.float32:
            product = torch.mm(x, self._weight.t(), out_dtype=torch.float32)
            return product if self.bias is None else product.add_(self.bias)
        return self(x.float())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        match self.form:
            case WeightForm.PLAIN:
                return F.linear(x, self._weight, self.bias)
            case WeightForm.INVARIANT:
                return _invariant(x, self._weight, self.bias, x.dtype)
            case WeightForm.TRANSPOSED:
                return x @ self._weight if self.bias is None else torch.addmm(self.bias, x, self._weight)
            case WeightForm.HALF:
                return torch.fbgemm_linear_fp16_weight_fp32_activation(x, self._weight, self.bias)


def choose_form(weight: torch.Tensor, dtype: torch.dtype) -> WeightForm:
    """The form for a weight of a checkpoint when activations have `dtype`."""
    if dtype != torch.float32 or weight.device.type != "cpu":
        return WeightForm.PLAIN
    # FBGEMM's product runs on one thread; with more of them the plain fp32 product is faster.
    if "fbgemm" in torch.backends.quantized.supported_engines and torch.get_num_threads() == 1 and fits_half(weight):
        return WeightForm.HALF
    return WeightForm.TRANSPOSED


def fits_half(weight: torch.Tensor) -> bool:
    """Whether fp16 holds a 16-bit weight so well that no fp32 product could tell: an error per row below one rounding of that row.

    Only bf16 values under 2**-17 lose bits, and at most 2**-25 each.
    """
    if weight.dtype == torch.float16:
        return True
    if weight.dtype != torch.bfloat16:
        return False
    wide = weight.float()
    error = wide - wide.half().float()
    # Norms in fp64: the squares of the smallest and the largest bf16 values leave fp32.
    return bool((error.norm(dim=1, dtype=torch.float64) <= wide.norm(dim=1, dtype=torch.float64) * 2.0**-24).all())


def _invariant(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    from kernels.triton_linear import linear  # only now: Triton is not installed everywhere

    product: torch.Tensor = linear(x, weight, bias, dtype)
    return product


def _pack_half(weight: torch.Tensor) -> torch.Tensor:
    # PyTorch marks these two operators as deprecated in favour of quantized.linear_dynamic_fp16, which does the same product on several
    # threads but takes a third longer on one (measured, batch 1). It says so once, at the first call of each.
    # The list of filters is the process's, and workers of one process may load at once.
    with _PACKING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.fbgemm_pack_gemm_matrix_fp16(weight.float())
        torch.fbgemm_linear_fp16_weight_fp32_activation(torch.zeros(1, weight.shape[1]), packed, None)
    return packed
