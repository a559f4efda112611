"""The loops of the CPU that Numba compiles, and what they are made of: 16-bit floats as bits, a power of two that vectorizes, threads.

A kernel is a Python function of arrays that Numba compiles on its first call for each kind of element, and keeps on disk. It is given a
range of work items first, so that several threads can share a call. NumPy has no bfloat16 and Numba's CPU target no float16: tensors of
these types arrive as uint16 and int16 bits, are read with `wide` and written with `narrow`.

All of it is in one file, for Numba compiles a kernel anew when the kernel's file has changed, and does not look at files it imports from.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
Array = NDArray[Any]

# Sums may be reordered and fused, which vectorizing needs; NaN and infinity keep their meaning.
_FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
LOG2_E = 1.4426950408889634  # exp(x) is exp2(x * LOG2_E)
# A tenth of a millisecond of reading; waking a thread for less than that costs more than it saves.
_MIN_BYTES_PER_THREAD = 1 << 20


def jit(kernel: Function) -> Function:
    """Compiles `kernel` when it is first called; it releases the interpreter lock while it runs."""
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FASTMATH}
    try:
        return cast(Function, numba.njit(cache=True, **settings)(kernel))
    except RuntimeError:  # no folder to keep it in: a read-only file system
        return cast(Function, numba.njit(**settings)(kernel))


def inline(function: Function) -> Function:
    """A function for kernels to call, compiled into each of them."""
    return cast(Function, numba.njit(inline="always", fastmath=_FASTMATH)(function))


def as_array(tensor: torch.Tensor) -> Array:
    """The tensor's memory as a kernel takes it."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    elif tensor.dtype == torch.float16:
        tensor = tensor.view(torch.int16)
    array: Array = tensor.numpy()
    return array


def launch(kernel: Callable[..., None], num_items: int, num_bytes: int, *arguments: Any) -> None:
    """kernel(begin, end, *arguments) over all items, which read `num_bytes` together, in at most as many pieces as PyTorch has threads."""
    num_threads = min(torch.get_num_threads(), num_items, num_bytes // _MIN_BYTES_PER_THREAD)
    if num_threads <= 1:
        kernel(0, num_items, *arguments)
        return
    bounds = [num_items * i // num_threads for i in range(num_threads + 1)]
    further = [_threads(num_threads - 1).submit(kernel, *piece, *arguments) for piece in pairwise(bounds[1:])]
    kernel(0, bounds[1], *arguments)
    for future in further:
        future.result()


@lru_cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="kernels")


def _instruction(build: Callable[[Any, Any], Any], argument: Any, result: Any) -> Any:
    """A function for kernels that is one LLVM instruction."""

    def typing(context: Any, value: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            return build(builder, arguments[0])

        return result(argument), generate

    return intrinsic(typing)


_float_of_bits = _instruction(lambda builder, bits: builder.bitcast(bits, ir.FloatType()), types.int32, types.float32)
_bits_of_float = _instruction(lambda builder, value: builder.bitcast(value, ir.IntType(32)), types.float32, types.int32)
_float_of_half_bits = _instruction(
    lambda builder, bits: builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType()), types.int16, types.float32
)
_half_bits_of_float = _instruction(
    lambda builder, value: builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16)), types.float32, types.int16
)


def wide(element: Any) -> Any:
    """An element of a tensor's array as fp32."""
    raise NotImplementedError("only compiled code calls it")


@overload(wide, strict=False)
def _wide(element: Any) -> Any:
    if element == types.uint16:
        return lambda element: _float_of_bits(np.int32(element) << np.int32(16))
    if element == types.int16:
        return lambda element: _float_of_half_bits(element)
    return lambda element: np.float32(element)


def narrow(value: Any, like: Any) -> Any:
    """An fp32 value rounded to the nearest of the array `like` can hold, ties to even."""
    raise NotImplementedError("only compiled code calls it")


@overload(narrow, strict=False)
def _narrow(value: Any, like: Any) -> Any:
    if like.dtype == types.uint16:
        return lambda value, like: _bf16_bits_of_float(value)
    if like.dtype == types.int16:
        return lambda value, like: _half_bits_of_float(value)
    return lambda value, like: value


@inline
def _bf16_bits_of_float(value: Any) -> Any:
    bits = np.uint32(_bits_of_float(value))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if value == value else np.uint16(0x7FC0)  # rounding could carry a NaN into a number


@inline
def exp2(x: Any) -> Any:
    """2**x in fp32 for x within ±126, held to those bounds outside of them: within 2 units in the last place, NaN stays NaN."""
    x = np.float32(-126) if x < np.float32(-126) else x
    x = np.float32(126) if x > np.float32(126) else x
    whole = np.floor(x + np.float32(0.5))
    f = x - whole  # -1/2 … 1/2, where the exponential series needs eight terms
    power = np.float32(1.5252734e-5)
    power = power * f + np.float32(1.5403530e-4)
    power = power * f + np.float32(1.3333558e-3)
    power = power * f + np.float32(9.6181291e-3)
    power = power * f + np.float32(5.5504109e-2)
    power = power * f + np.float32(2.4022651e-1)
    power = power * f + np.float32(6.9314718e-1)
    power = power * f + np.float32(1)
    return power * _float_of_bits((np.int32(whole) + np.int32(127)) << np.int32(23))


@jit
def rms_norm(begin: int, end: int, x: Any, weight: Any, eps: float, output: Any) -> None:
    width = x.shape[1]
    for row in range(begin, end):
        squares = np.float32(0)
        for i in range(width):
            squares += wide(x[row, i]) * wide(x[row, i])
        scale = np.float32(1 / np.sqrt(squares / np.float32(width) + np.float32(eps)))
        for i in range(width):
            output[row, i] = narrow(wide(x[row, i]) * scale * wide(weight[i]), output)


@jit
def add_rms_norm(begin: int, end: int, residual: Any, delta: Any, weight: Any, eps: float, output: Any) -> None:
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
def silu_and_mul(begin: int, end: int, gate_up: Any, output: Any) -> None:
    width = output.shape[1]
    for row in range(begin, end):
        for i in range(width):
            gate = wide(gate_up[row, i])
            sigmoid = np.float32(1) / (np.float32(1) + exp2(gate * np.float32(-LOG2_E)))
            output[row, i] = narrow(gate * sigmoid * wide(gate_up[row, width + i]), output)


@jit
def rope_and_write_kv(
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


@jit
def decode_attention(
    begin: int,
    end: int,
    query: Any,
    pool: Any,
    layer: int,
    block_tables: Any,
    context_lens: Any,
    first_visible: Any,
    scale: float,
    output: Any,
) -> None:
    """Items are pairs (sequence, KV head); `scale` is in powers of two; lists as in cpu_attention.DecodePlan."""
    num_kv_heads, block_size = pool.shape[2], pool.shape[3]
    head_dim, value_dim = query.shape[2], output.shape[2]
    group = query.shape[1] // num_kv_heads
    queries = np.empty((group, head_dim), dtype=np.float32)
    sums = np.empty((group, value_dim), dtype=np.float32)  # of the values, weighted
    totals = np.empty(group, dtype=np.float32)  # of the weights
    highest = np.empty(group, dtype=np.float32)  # score so far; weights are relative to it
    scores = np.empty(block_size, dtype=np.float32)
    for item in range(begin, end):
        sequence, kv_head = divmod(item, num_kv_heads)
        context, first = context_lens[sequence], first_visible[sequence]
        for g in range(group):
            for i in range(head_dim):
                queries[g, i] = wide(query[sequence, kv_head * group + g, i]) * np.float32(scale)
        sums[:] = 0
        totals[:] = 0
        highest[:] = -np.inf
        for block in range(first // block_size, (context + block_size - 1) // block_size):
            start = max(first - block * block_size, 0)
            count = min(context - block * block_size, block_size) - start
            cells = pool[block_tables[sequence, block], layer, kv_head, start : start + count]
            for g in range(group):
                top = highest[g]
                for cell in range(count):
                    score = np.float32(0)
                    for i in range(head_dim):
                        score += queries[g, i] * wide(cells[cell, i])
                    scores[cell] = score
                    top = max(top, score)
                total = np.float32(0)
                for cell in range(count):
                    weight = exp2(scores[cell] - top)
                    scores[cell] = weight
                    total += weight
                rescale = exp2(highest[g] - top)
                highest[g] = top
                totals[g] = totals[g] * rescale + total
                for i in range(value_dim):
                    sums[g, i] *= rescale
                even = count - count % 2
                for cell in range(0, even, 2):  # two at once: half as many passes over `sums`
                    weight, next_weight = scores[cell], scores[cell + 1]
                    for i in range(value_dim):
                        sums[g, i] += weight * wide(cells[cell, head_dim + i]) + next_weight * wide(cells[cell + 1, head_dim + i])
                for cell in range(even, count):
                    for i in range(value_dim):
                        sums[g, i] += scores[cell] * wide(cells[cell, head_dim + i])
        for g in range(group):
            for i in range(value_dim):
                output[sequence, kv_head * group + g, i] = narrow(sums[g, i] / totals[g], output)
