"""The launches of production: what the host code would launch for models that people serve, recorded without a GPU.

Host code runs with tensors that have shapes but no memory. Run by a process of its own, which has not chosen Triton's interpreter.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import KVFormat, KVLayout, triton_attention, triton_invariant, triton_linear
from kernels import triton_backend as backend
from kernels.block_lists import dense

META = torch.device("meta")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "ptx_options")


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments it was launched with."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def compile(self, capability: int) -> Any:
        """For sm_`capability`, as Triton would at this launch: arguments that 16 divides are known to be so, and those that are 1."""
        names = self.kernel.arg_names
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(names):
            value, parameter = self.arguments[name], self.kernel.params[index]
            is_specialized = not parameter.do_not_specialize
            is_one = isinstance(value, int) and not isinstance(value, bool) and value == 1
            if parameter.is_constexpr or value is None or (is_one and is_specialized):
                signature[name], constants[(index,)] = "constexpr", value
                continue
            signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
            offset = value.storage_offset() * value.itemsize if isinstance(value, torch.Tensor) else value
            if isinstance(offset, int) and offset % 16 == 0 and is_specialized:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Launches are written down instead of made, as they would be on a GPU of this capability."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    with (
        patch.object(triton.runtime.jit.JITFunction, "run", run),
        patch.object(triton_attention, "capability", lambda device: capability),
    ):
        yield launches


def attention(
    layout: KVLayout,
    num_heads: int,
    query_lens: list[int],
    *,
    softcap: float | None = None,
    has_sinks: bool = False,
    invariant: bool = False,
    **planned: Any,
) -> None:
    """One step's attention of sequences of 4,096 tokens."""
    plan_attention = triton_invariant.plan_attention if invariant else backend.plan_attention
    context_lens = [4096] * len(query_lens)
    tables = [list(range(-(-4096 // layout.block_size)))] * len(query_lens)
    pool = layout.allocate(100_000, META)
    query = torch.empty(sum(query_lens), num_heads, layout.head_dim, dtype=layout.dtype, device=META)
    plan = plan_attention(
        block_tables=tables, query_lens=query_lens, context_lens=context_lens, layout=layout, num_heads=num_heads, device=META, **planned
    )
    sinks = torch.empty(num_heads, device=META) if has_sinks else None
    backend.paged_attention(query, pool, layout.num_layers - 1, plan, scale=0.1, softcap=softcap, sinks=sinks)


def write(layout: KVLayout, num_heads: int, *, has_norm: bool) -> None:
    qkv = torch.empty(512, num_heads + 2 * layout.num_kv_heads, layout.head_dim, dtype=layout.dtype, device=META)
    integers, table = torch.empty(512, dtype=torch.int64, device=META), torch.empty(4096, layout.head_dim // 2, device=META)
    norm = torch.empty(layout.head_dim, dtype=layout.dtype, device=META) if has_norm else None
    backend.rope_and_write_kv(
        qkv,
        layout.allocate(100, META),
        layout,
        3,
        positions=integers,
        slots=integers,
        cos=table,
        sin=table,
        query_norm=norm,
        key_norm=norm,
        eps=1e-6,
    )


def write_latent(num_heads: int) -> None:
    query = torch.empty(512, num_heads, 192, dtype=LATENT.dtype, device=META)
    integers, table = torch.empty(512, dtype=torch.int64, device=META), torch.empty(4096, 32, device=META)
    cell, norm = (torch.empty(*shape, dtype=LATENT.dtype, device=META) for shape in ((512, LATENT.head_dim), (LATENT.value_dim,)))
    pool = LATENT.allocate(100, META)
    backend.rope_and_write_latent(
        query, cell, pool, LATENT, 3, positions=integers, slots=integers, cos=table, sin=table, norm=norm, eps=1e-6
    )


def products(dtype: torch.dtype) -> None:
    """In batch-invariant mode, of a layer, and of all heads of latents."""
    x, weight = torch.empty(64, 4096, dtype=dtype, device=META), torch.empty(28672, 4096, dtype=dtype, device=META)
    triton_linear.linear(x, weight, None, x.dtype)
    triton_linear.linear(x[:, :4000].contiguous(), weight[:, :4000].contiguous(), weight[:, 0].contiguous(), torch.float32)
    query, up = torch.empty(64, 16, 192, dtype=dtype, device=META), torch.empty(16, 256, 512, dtype=dtype, device=META)
    triton_linear.batched_linear(query[..., :128].transpose(0, 1), up[:, :128].transpose(1, 2))


def elementwise(dtype: torch.dtype) -> None:
    x = torch.empty(64, 4096, dtype=dtype, device=META)
    backend.rms_norm(x, x[0], 1e-5)
    backend.add_rms_norm(x, x, x[0], 1e-5)
    backend.activate_and_mul(torch.empty(64, 28672, dtype=dtype, device=META), "silu")
    backend.merge_attention(torch.empty(4, 64, 32, 128, dtype=dtype, device=META), torch.empty(4, 64, 32, device=META))


def copies(layout: KVLayout, wire: KVLayout) -> None:
    blocks = torch.empty(32, dtype=torch.int32, device=META)
    backend.copy_blocks(layout.allocate(100, META), layout, wire.allocate(32, META), wire, source_blocks=blocks)


def grouped(
    form: KVFormat = KVFormat.PLAIN, *, head_dim: int = 128, num_kv_heads: int = 8, dtype: torch.dtype = torch.bfloat16
) -> KVLayout:
    """Of the Llama 3 8B kind."""
    return KVLayout(num_layers=32, num_kv_heads=num_kv_heads, block_size=64, head_dim=head_dim, dtype=dtype, format=form)


LATENT = KVLayout(num_layers=27, num_kv_heads=1, block_size=64, head_dim=576, value_head_dim=512, is_latent=True, dtype=torch.bfloat16)
EXPANDED = KVLayout(num_layers=1, num_kv_heads=16, block_size=64, head_dim=192, value_head_dim=128, dtype=torch.bfloat16)
Case = Callable[[], None]


def production() -> dict[str, Case]:
    """What `make test` compiles."""
    decode = [1] * 8
    cases: dict[str, Case] = {
        "decode": partial(attention, grouped(), 32, decode),
        "verify": partial(attention, grouped(), 32, [4] * 8),
        "prefill": partial(attention, grouped(), 32, [2048]),
        "prefill by lists": partial(attention, grouped(), 32, [2048], block_lists=[dense(64, 8)]),
        "decode in a window": partial(attention, grouped(), 32, decode, window=1024),
        "decode over latents, 16 heads": partial(attention, LATENT, 16, decode),
        "decode over latents, 128 heads": partial(attention, LATENT, 128, decode),
        "verify over latents, 16 heads": partial(attention, LATENT, 16, [4] * 8),
        "prefill over expanded latents": partial(attention, EXPANDED, 16, [2048]),
        "write latents": partial(write_latent, 16),
        "invariant decode": partial(attention, grouped(), 32, decode, invariant=True),
        "invariant prompt": partial(attention, grouped(), 32, [2048], invariant=True),
        "invariant over latents": partial(attention, LATENT, 16, [16], invariant=True),
        "invariant products": partial(products, torch.bfloat16),
        "elementwise": partial(elementwise, torch.bfloat16),
        "copy": partial(copies, grouped(), grouped()),
        "copy to int8": partial(copies, grouped(), grouped(KVFormat.INT8)),
    }
    for form in KVFormat:
        cases[f"write {form.name.lower()}"] = partial(write, grouped(form), 32, has_norm=True)
        if form is not KVFormat.PLAIN:
            cases[f"decode {form.name.lower()}"] = partial(attention, grouped(form), 32, decode)
    return cases


def everything() -> dict[str, Case]:
    """What `make compile-kernels` compiles: all that kernels are specialized for, in all pairs that models have."""
    cases = production()
    steps = {"decode": [1] * 8, "verify": [8] * 8, "verify 16": [16] * 8, "prefill": [2048]}
    for form, head_dim in product(KVFormat, (64, 80, 96, 128, 256)):
        layout, kind = grouped(form, head_dim=head_dim), f"{form.name.lower()} {head_dim}"
        for (name, query_lens), window in product(steps.items(), (None, 1024)):
            cases[f"{name} {kind} window {window}"] = partial(attention, layout, 32, query_lens, window=window)
        for name, window in product(("decode", "prefill"), (None, 1024)):
            cases[f"invariant {name} {kind} window {window}"] = partial(attention, layout, 32, steps[name], window=window, invariant=True)
        cases[f"write {kind}"] = partial(write, layout, 32, has_norm=False)
    for name, query_lens in steps.items():
        cases[f"{name} with sinks"] = partial(attention, grouped(), 64, query_lens, has_sinks=True, window=128)
        cases[f"{name} with capped scores"] = partial(attention, grouped(head_dim=256, num_kv_heads=4), 8, query_lens, softcap=50.0)
        cases[f"{name} in fp16"] = partial(attention, grouped(dtype=torch.float16), 32, query_lens)
    cases["invariant products in fp16"] = partial(products, torch.float16)
    cases["invariant products in fp32"] = partial(products, torch.float32)
    cases["tree"] = partial(attention, grouped(), 32, [8] * 8, ancestors=torch.ones(64, dtype=torch.int64))
    for heads, invariant in product((16, 128), (False, True)):
        kind = f"latents, {heads} heads" + ", in invariant mode" * invariant
        tree = torch.ones(64, dtype=torch.int64)
        cases[f"tree over {kind}"] = partial(attention, LATENT, heads, [8] * 8, invariant=invariant, ancestors=tree)
        if invariant:
            cases[f"decode over {kind}"] = partial(attention, LATENT, heads, [1] * 8, invariant=True)
    cases["decode over latents with sinks"] = partial(attention, LATENT, 128, [1] * 8, has_sinks=True)
    cases["decode over latents with capped scores"] = partial(attention, LATENT, 128, [1] * 8, softcap=50.0)
    return cases


def main() -> None:
    """Prints what attention in batch-invariant mode is compiled for and with, launch by launch."""
    for query_lens, window in product(([1] * 8, [2048]), (None, 1024)):
        with recorded(90) as launches:
            attention(grouped(), 32, query_lens, invariant=True, window=window)
        for launch in launches:
            if launch.kernel.__name__ == "decode_attention":
                constants = {name: launch.arguments[name] for name in launch.kernel.arg_names if name.isupper()}
                print(json.dumps({**constants, **launch.options}))


if __name__ == "__main__":
    main()
