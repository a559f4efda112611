"""The Triton kernels on a GPU: first checked against the reference, then timed beside what PyTorch has. Needs torch, triton and numpy only.

    python -m loadtest.micro.gpu [--write kernels/H200.md] [--peer module:function ...]

Times are of launches in a CUDA graph, over layers of a pool that no cache holds, medians over replays. Ceilings (copying, a bf16 matrix
product) are measured in the same run. A peer is a function that is given a Case and returns a call to time, or None where it has none.
"""

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels import BackendName, KVFormat, KVLayout
from kernels.block_lists import dense, randomly, sinks, sliding_window
from loadtest.micro import gpu_engine
from loadtest.micro.gpu_bench import Attention, Bench, Call, Row

TOLERANCE = 2e-2  # bf16 results of fp32 sums


@dataclass(frozen=True)
class Case:
    """What a peer is given: `query` [T, Hq, D]; dense keys and values [S, Hk, C, D] of a decode or prefill batch without a page table."""

    name: str
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    query_len: int
    scale: float


# The lines of the table, and what each must reach.
TARGETS = {
    "copy, 512 MiB": "",
    "bf16 matrix product, 8192 cubed": "",
    "decode bf16 B1/32k": ">= 3.2 TB/s",
    "decode bf16 B8/8k": ">= 3.2 TB/s",
    "decode bf16 B32/4k": "<= 145 us",
    "decode fp8 KV B32/4k": ">= 1.6x bf16",
    "decode int8 KV B32/4k": ">= 1.6x bf16",
    "decode int4 KV B32/4k": ">= 2.4x bf16",
    "verify q2 B8/8k": "<= 1.15x q1",
    "verify q4 B8/8k": "<= 1.15x q1",
    "verify q8 B8/8k": "<= 1.15x q1",
    "prefill causal 8k bf16": ">= 450 TFLOP/s",
    "prefill by lists of all blocks": ">= 85 % of dense",
    "prefill by BigBird's lists": ">= 85 % of dense",
    "decode MLA 16 heads B32/8k": ">= 2.0 TB/s",
    "decode MLA 128 heads B32/8k": ">= 330 TFLOP/s",
    "RoPE + int8 + write, 512 tokens": "<= 4 us",
    "RoPE + int8 + write, 16k tokens": ">= 70 % of copy",
    "pack": ">= 85 % of copy",
    "unpack": ">= 85 % of copy",
    "blocks to the host": "",
    "blocks from the host": "",
    "LSE merge of 4, 4k x 32 x 128": ">= 85 % of copy",
    "invariant decode B32/4k": "",
    "invariant prefill 8k": "",
    "invariant product, 32 x 8192 x 8192": "",
    "invariant product, 8192 x 8192 x 8192": "",
    "engine step, 8B bf16 B1/4k": "",
    "engine step, 8B bf16 B32/4k": "",
    "engine step, 8B bf16 B32/4k, invariant": "",
}


def checks(bench: Bench) -> Iterator[tuple[str, float]]:
    """Name and largest error of small cases of every kind."""
    few, small = bench.size(4, 2), bench.size(1000, 70)
    heads: dict[str, Any] = {"heads": bench.size(32, 4), "kv_heads": bench.size(8, 2), "head_dim": bench.size(128, 32)}
    for form in KVFormat:
        for query_len in (1, 4):
            yield (
                f"decode {form.name.lower()} q{query_len}",
                Attention(bench, sequences=few, context_len=small, query_len=query_len, form=form, **heads).error(),
            )
        yield (
            f"prefill {form.name.lower()}",
            Attention(bench, sequences=2, context_len=small, query_len=small * 3 // 4, form=form, **heads).error(),
        )
    for query_len in (1, small // 2):
        windowed = Attention(bench, sequences=2, context_len=small, query_len=query_len, window=small // 3, **heads)
        yield f"window q{query_len}", windowed.error(window=small // 3)
    latent: dict[str, Any] = {"kv_heads": 1, "head_dim": bench.size(576, 48), "value_dim": bench.size(512, 32)}
    for num_heads in (16, bench.size(128, 32)):
        yield f"latents {num_heads} heads", Attention(bench, sequences=few, context_len=small, heads=num_heads, **latent).error()
    prompts: dict[str, Any] = {"sequences": 2, "context_len": bench.size(3000, 70), "query_len": bench.size(3000, 70)}
    kinds: dict[str, dict[str, Any]] = {
        "plain": heads,
        "window": heads | {"window": bench.size(1500, 40)},
        "int8": heads | {"form": KVFormat.INT8},
        "latents": latent | {"heads": 16},
    }
    for kind, more in kinds.items():
        yield (
            f"same bits however cut, {kind}",
            _difference_of_cuts(bench, Attention(bench, backend=BackendName.TRITON_INVARIANT, **prompts, **more)),
        )
    yield from gpu_engine.check(bench.device, tiny=bench.size.tiny)


def _difference_of_cuts(bench: Bench, work: Attention) -> float:
    """Of the first prompt at once and in three pieces, each beside a token of the second; on a GPU any is too much."""
    length, layout = work.context_lens[0], work.layout
    other = work.query[-1:]
    pieces = []
    for start, end in pairwise((0, length // 3, length - 1, length)):
        plan = work.backend.plan_attention(
            block_tables=[work.tables[1], work.tables[0][: -(-end // layout.block_size)]],
            query_lens=[1, end - start],
            context_lens=[length, end],
            layout=layout,
            num_heads=work.query.shape[1],
            device=bench.device,
            window=work.window,
        )
        rows = torch.cat((other, work.query[start:end]))
        pieces.append(work.backend.paged_attention(rows, work.pool, 0, plan, scale=work.scale)[1:])
    difference = float((torch.cat(pieces) - work.call(0)[:length]).abs().max())
    # In the interpreter products are the processor's library's, which gives a row other bits in another place of a tile.
    return float("inf") if difference and bench.device.type == "cuda" else difference


def measure(bench: Bench, peers: Sequence[Callable[[Case], Call | None]]) -> Iterator[Row]:
    """The lines of the table."""
    size = bench.size
    heads: dict[str, Any] = {"heads": size(32, 4), "kv_heads": size(8, 2), "head_dim": size(128, 32)}
    copy = bench.copy_bytes_per_s(size(1 << 29, 1 << 12))
    yield Row("copy, 512 MiB", f"{copy / 1e12:.2f} TB/s")
    square = size(8192, 64)
    left, right = bench.randn(square, square), bench.randn(square, square)
    yield Row("bf16 matrix product, 8192 cubed", f"{2 * square**3 / bench.seconds([lambda: left @ right]) / 1e12:.0f} TFLOP/s")

    plain_s = 0.0
    for sequences, context in ((1, 32768), (8, 8192), (32, 4096)):
        work = Attention(bench, sequences=size(sequences, 2), context_len=size(context, 70), **heads)
        plain_s = work.seconds(bench)
        rate = work.kv_bytes / plain_s
        passed = rate >= 3.2e12 if sequences < 32 else plain_s <= 145e-6
        row = Row(f"decode bf16 B{sequences}/{context // 1024}k", f"{plain_s * 1e6:.0f} us, {rate / 1e12:.2f} TB/s", passed)
        yield _beside(row, work, bench, peers)
    for form, least in ((KVFormat.FP8, 1.6), (KVFormat.INT8, 1.6), (KVFormat.INT4, 2.4)):
        work = Attention(bench, sequences=size(32, 2), context_len=size(4096, 70), form=form, **heads)
        ratio = plain_s / work.seconds(bench)
        yield Row(f"decode {form.name.lower()} KV B32/4k", f"{ratio:.2f}x", ratio >= least)
    one_s = Attention(bench, sequences=size(8, 2), context_len=size(8192, 70), **heads).seconds(bench)
    for query_len in (2, 4, 8):
        work = Attention(bench, sequences=size(8, 2), context_len=size(8192, 70), query_len=query_len, **heads)
        ratio = work.seconds(bench) / one_s
        yield Row(f"verify q{query_len} B8/8k", f"{ratio:.2f}x", ratio <= 1.15)

    tokens = size(8192, 64)
    prompt: dict[str, Any] = {"sequences": 1, "context_len": tokens, "query_len": tokens}
    work = Attention(bench, **prompt, **heads)
    flops = 4 * heads["heads"] * heads["head_dim"] * tokens * (tokens + 1) / 2
    dense_rate = flops / work.seconds(bench)
    row = Row("prefill causal 8k bf16", f"{dense_rate / 1e12:.0f} TFLOP/s", dense_rate >= 450e12)
    yield _beside(row, work, bench, peers)
    blocks = tokens // work.layout.block_size
    shape = (blocks, heads["kv_heads"])
    lists = sliding_window(*shape, width=blocks // 16 or 1) | sinks(*shape, count=1) | randomly(*shape, count=blocks // 32, seed=0)
    for name, one in (("lists of all blocks", dense(*shape)), ("BigBird's lists", lists)):
        visited = sum(len(seen) for head in one.seen for seen in head) / heads["kv_heads"] + blocks / 2
        density = visited / (blocks * (blocks + 1) / 2)
        rate = flops * density / Attention(bench, **prompt, **heads, block_lists=[one]).seconds(bench)
        share = rate / dense_rate
        yield Row(f"prefill by {name}", f"{100 * share:.0f} %, at a density of {100 * density:.0f} %", share >= 0.85)

    latent: dict[str, Any] = {"kv_heads": 1, "head_dim": size(576, 48), "value_dim": size(512, 32)}
    work = Attention(bench, sequences=size(32, 2), context_len=size(8192, 70), heads=16, **latent)
    rate = work.kv_bytes / work.seconds(bench)
    yield Row("decode MLA 16 heads B32/8k", f"{rate / 1e12:.2f} TB/s", rate >= 2.0e12)
    work = Attention(bench, sequences=size(32, 2), context_len=size(8192, 70), heads=size(128, 32), **latent)
    rate = 2 * len(work.query) * work.query.shape[1] * work.context_lens[0] * (576 + 512) / work.seconds(bench)
    yield Row("decode MLA 128 heads B32/8k", f"{rate / 1e12:.0f} TFLOP/s", rate >= 330e12)
    yield from _moving(bench, copy)
    yield from _invariant(bench)
    for name, figure in gpu_engine.measure(bench.device, tiny=bench.size.tiny):
        yield Row(name, figure)


def _moving(bench: Bench, copy: float) -> Iterator[Row]:
    """Writing, packing and merging: bound by bytes."""
    from kernels import triton_backend

    size = bench.size
    plain, int8 = (
        KVLayout(num_layers=2, num_kv_heads=8, block_size=64, head_dim=size(128, 32), dtype=bench.randn(1).dtype, format=form)
        for form in (KVFormat.PLAIN, KVFormat.INT8)
    )
    for tokens in (512, 16384):
        count = size(tokens, 32)
        pool = int8.allocate(-(-count // 64), bench.device)
        qkv = [bench.randn(count, 48, plain.head_dim) for _ in range(bench.layers(count * 48 * plain.head_dim * 2))]
        table = torch.ones(count, plain.head_dim // 2, device=bench.device)
        cells = torch.arange(count, device=bench.device)
        write: Any = partial(triton_backend.rope_and_write_kv, positions=cells, slots=cells, cos=table, sin=table)
        seconds = bench.seconds([partial(write, one, pool, int8, 0) for one in qkv])
        moved = qkv[0].nbytes + count * 32 * plain.head_dim * 2 + count * 8 * int8.head_bytes / 64
        share = moved / seconds / copy
        passed, name = (seconds <= 4e-6, "512") if tokens == 512 else (share >= 0.7, "16k")
        yield Row(f"RoPE + int8 + write, {name} tokens", f"{seconds * 1e6:.1f} us, {100 * share:.0f} % of copy", passed)
    blocks = size(2048, 4)
    pool = plain.allocate(2 * blocks, bench.device)
    packed = plain.allocate(blocks, bench.device)
    chosen = torch.randperm(2 * blocks)[:blocks].to(bench.device, torch.int32)
    pack: Any = partial(triton_backend.copy_blocks, pool, plain, packed, plain, source_blocks=chosen)
    unpack: Any = partial(triton_backend.copy_blocks, packed, plain, pool, plain, target_blocks=chosen)
    for name, call in (("pack", pack), ("unpack", unpack)):
        seconds = bench.seconds([call])
        share = 2 * packed.nbytes / seconds / copy
        yield Row(name, f"{100 * share:.0f} %", share >= 0.85)
    outside = plain.allocate(2 * blocks, torch.device("cpu"))
    outside = outside if size.tiny else outside.pin_memory()
    same: Any = {"source_blocks": chosen, "target_blocks": chosen}
    for name, source, target in (("to", pool, outside), ("from", outside, pool)):
        seconds = bench.seconds([partial(triton_backend.copy_blocks, source, plain, target, plain, **same)])
        whole_s = bench.seconds([partial(target[:blocks].copy_, source[:blocks], non_blocking=True)])
        rates = [f"{packed.nbytes / one / 1e9:.1f} GB/s" for one in (seconds, whole_s)]
        yield Row(f"blocks {name} the host", rates[0], beside=[f"one copy of as many bytes {rates[1]}"])
    rows = size(4096, 4)
    parts = bench.randn(4, rows, 32, 128)
    log_sums = torch.randn(4, rows, 32, device=bench.device)
    seconds = bench.seconds([partial(triton_backend.merge_attention, parts, log_sums)])
    share = (parts.nbytes * 1.25 + log_sums.nbytes * 1.25) / seconds / copy
    yield Row("LSE merge of 4, 4k x 32 x 128", f"{100 * share:.0f} %", share >= 0.85)


def _invariant(bench: Bench) -> Iterator[Row]:
    """What batch-invariant mode costs: times of what is done without it."""
    from kernels import triton_linear

    size = bench.size
    heads: dict[str, Any] = {"heads": size(32, 4), "kv_heads": size(8, 2), "head_dim": size(128, 32)}
    tokens = size(8192, 64)
    shapes: dict[str, dict[str, Any]] = {
        "decode B32/4k": {"sequences": size(32, 2), "context_len": size(4096, 70)},
        "prefill 8k": {"sequences": 1, "context_len": tokens, "query_len": tokens},
    }
    for name, shape in shapes.items():
        usual_s = Attention(bench, **shape, **heads).seconds(bench)
        invariant_s = Attention(bench, **shape, **heads, backend=BackendName.TRITON_INVARIANT).seconds(bench)
        yield Row(f"invariant {name}", f"{invariant_s / usual_s:.2f}x")
    width = size(8192, 64)
    for rows in (32, 8192):
        x = bench.randn(size(rows, 4), width)
        weights = [bench.randn(width, width) for _ in range(bench.layers(2 * width**2))]
        usual_s = bench.seconds([partial(F.linear, x, weight) for weight in weights])
        invariant_s = bench.seconds([partial(triton_linear.linear, x, weight) for weight in weights])
        yield Row(f"invariant product, {rows} x 8192 x 8192", f"{invariant_s / usual_s:.2f}x")


def _beside(row: Row, work: Attention, bench: Bench, peers: Sequence[Callable[[Case], Call | None]]) -> Row:
    """Adds what PyTorch's attentions take on contiguous keys and values, and peers."""
    layout, sequences = work.layout, len(work.tables)
    heads, query_len = layout.num_kv_heads, work.query_lens[0]
    context = work.context_lens[0]
    keys, values = (bench.randn(sequences, heads, context, layout.head_dim) for _ in range(2))
    query = work.query.view(sequences, query_len, -1, layout.head_dim).transpose(1, 2)
    case = Case(row.name, work.query, keys, values, query_len, work.scale)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=query_len > 1, scale=work.scale, enable_gqa=True)

    def flex() -> torch.Tensor:
        attended: torch.Tensor = flexible(query, keys, values, block_mask=mask, scale=work.scale, enable_gqa=True)
        return attended

    flexible: Any = flex_attention if bench.size.tiny else torch.compile(flex_attention)
    mask = create_block_mask(_causal, None, None, query_len, context, device=str(bench.device)) if query_len > 1 else None
    for name, call in [("SDPA", sdpa), ("FlexAttention", flex), *((peer.__module__, peer(case)) for peer in peers)]:
        if call is None:
            continue
        try:
            row.beside.append(f"{name} {bench.seconds([call]) * 1e6:.0f} us")
        except Exception as error:  # what is beside our lines must not end them
            row.beside.append(f"{name}: {type(error).__name__}")
    return row


def _causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query >= key


def _peer(named: str) -> Callable[[Case], Call | None]:
    module, _, function = named.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks and times the Triton kernels on a GPU.")
    parser.add_argument("--write", type=Path, help="a Markdown file for the table, if there is a GPU")
    parser.add_argument("--peer", action="append", default=[], type=_peer, metavar="MODULE:FUNCTION", help="what else to time")
    parser.add_argument("--tiny", action="store_true", help="without a GPU: runs everything once, tiny, in Triton's interpreter")
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    lines = ["| kernel | target | measured | reached | beside it |", "| --- | --- | --- | --- | --- |"]
    if not has_gpu and not options.tiny:
        print("no NVIDIA GPU here: nothing was checked or measured\n")
        print("\n".join(lines + [f"| {name} | {target} | not measured | | |" for name, target in TARGETS.items()]))
        return
    bench = Bench(torch.device("cuda" if has_gpu else "cpu"), tiny=options.tiny)
    wrong = []
    for name, error in checks(bench):
        is_right = error <= TOLERANCE
        print(f"{'right' if is_right else 'WRONG':6} {name:32} {error:.1e}", flush=True)
        wrong += [] if is_right else [name]
    print("\n".join(lines))
    for row in measure(bench, options.peer):
        if options.tiny:
            row = Row(row.name, "runs")
        reached = "" if row.passed is None else "yes" if row.passed else "no"
        lines.append(f"| {row.name} | {TARGETS[row.name]} | {row.value} | {reached} | {'; '.join(row.beside)} |")
        print(lines[-1], flush=True)
    if has_gpu and options.write is not None and not options.tiny:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
        ).stdout.strip()
        head = f"# {driver}\n\n{time.strftime('%Y-%m-%d')}, commit {_commit()}, torch {torch.__version__}: `make gpu`\n\n"
        options.write.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
