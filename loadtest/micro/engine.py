"""`micro engine`: tokens per second of the engine, whole, and of its decode attention, beside what anybody has without it.

Our side is everything a request passes: submit on the event loop, the engine thread, sampling, events back on the loop. A reference
computes the same checkpoint in a process of its own, idle while ours runs and the other way round; all sides alternate, and medians count.
"""

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import kernels
from kernels import KVLayout
from loadtest.micro import checkpoint
from loadtest.micro.figure import Figure
from services.core.types import SamplingParams
from services.engine.engine import Engine
from services.engine.loader import load_model
from services.engine.sequence import EngineRequest
from services.engine.settings import EngineSettings

PROMPT_TOKENS = OUTPUT_TOKENS = 128
PREFILL_TOKENS = 1024
# 16 requests of 16 … 512 tokens in and out, drawn once.
RAGGED = [(random.Random(i).randint(16, 512), random.Random(100 + i).randint(16, 512)) for i in range(16)]
# The checkpoint's own dtype, and the one that processors without bf16 instructions run faster.
REFERENCE_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# Targets are over a reference, by its name: at least as fast as vLLM in either dtype.
AHEAD_OF_VLLM = {"vllm bf16": 1.0, "vllm fp32": 1.0}


def measure(*, runs: int, num_threads: int, vllm_python: Path | None) -> tuple[list[Figure], dict[str, object]]:
    """All figures of the engine, and the conditions they hold under; beside vLLM too, given an interpreter that has it."""
    interpreters = {"transformers": Path(sys.executable)} | ({"vllm": vllm_python} if vllm_python else {})
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        directory = Path(scratch)
        checkpoint.make_checkpoint(directory)
        references = {
            f"{peer} {short}": stack.enter_context(_reference(interpreter, peer, directory, dtype, num_threads))
            for peer, interpreter in interpreters.items()
            for short, dtype in REFERENCE_DTYPES.items()
        }
        loaded = load_model(directory, EngineSettings(num_threads=num_threads))
        bench = _EngineBench(Engine(loaded.core, max_num_requests=64), references, runs)
        figures = asyncio.run(bench.figures())
    figures.append(_attention_figure(runs, loaded.dtype))
    conditions: dict[str, object] = {"threads": num_threads, "dtype": str(loaded.dtype).removeprefix("torch."), "torch": torch.__version__}
    for reference in references.values():
        conditions |= reference.versions
    return figures, conditions


class _Reference:
    """A running {peer}_reference.py."""

    def __init__(self, process: subprocess.Popen[str], peer: str) -> None:
        self._process = process
        self._peer = peer
        self.versions: dict[str, object] = self._read()

    def seconds(self, lens: Sequence[tuple[int, int]]) -> float:
        """Time to complete a batch of (prompt, output) lengths."""
        assert self._process.stdin
        job = {"prompt_lens": [prompt for prompt, _ in lens], "output_lens": [output for _, output in lens]}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self._peer} reference ended: is {self._peer} installed where it was looked for?")
        value: dict[str, Any] = json.loads(line)
        return value


@contextlib.contextmanager
def _reference(interpreter: Path, peer: str, directory: Path, dtype: str, num_threads: int) -> Iterator[_Reference]:
    script = Path(__file__).with_name(f"{peer}_reference.py")
    command = [str(interpreter), "-I", str(script), str(directory), dtype, str(num_threads)]
    with subprocess.Popen(command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _Reference(process, peer)
        finally:
            process.terminate()


class _EngineBench:
    def __init__(self, engine: Engine, references: dict[str, _Reference], runs: int) -> None:
        self._engine = engine
        self._references = references
        self._runs = runs
        self._random = random.Random(0)
        self._num_requests = 0

    async def figures(self) -> list[Figure]:
        async with self._engine:
            uniform = (PROMPT_TOKENS, OUTPUT_TOKENS)
            await self._seconds([uniform])  # warm up
            overheads: list[float] = []
            figures = [
                *await self._compare("decode, batch 1", [uniform], {"transformers bf16": 1.7} | AHEAD_OF_VLLM),
                *await self._compare("decode, batch 16", [uniform] * 16, {"transformers bf16": 2.2} | AHEAD_OF_VLLM, overheads=overheads),
                *await self._compare("decode, batch 64", [uniform] * 64, AHEAD_OF_VLLM, skipped="transformers bf16"),
                *await self._compare("16 ragged requests", RAGGED, {"transformers bf16": 3.0}),
                *await self._compare("prefill of 1,024", [(PREFILL_TOKENS, 1)], {"transformers bf16": 1.0}, count_prompt=True),
            ]
        overhead = Figure(
            name="overhead per step, batch 16",
            value=100 * statistics.median(overheads),
            unit="% of wall time outside the model",
            runs=self._runs,
            target=15,
            at_most=True,
            on_ratio=False,
        )
        return [*figures, overhead]

    async def _compare(
        self,
        name: str,
        lens: Sequence[tuple[int, int]],
        targets: dict[str, float],
        *,
        count_prompt: bool = False,
        skipped: str | None = None,
        overheads: list[float] | None = None,
    ) -> list[Figure]:
        """Ours against every reference but the `skipped` one (for its time); `targets` has what to reach over whom."""
        num_tokens = sum(prompt if count_prompt else output for prompt, output in lens)
        references = {name: reference for name, reference in self._references.items() if name != skipped}
        ours: list[float] = []
        theirs: dict[str, list[float]] = {name: [] for name in references}
        for _ in range(self._runs):
            before = self._engine.stats()
            seconds = await self._seconds(lens)
            ours.append(num_tokens / seconds)
            if overheads is not None:
                overheads.append(1 - (self._engine.stats().model_s - before.model_s) / seconds)
            for reference_name, reference in references.items():
                theirs[reference_name].append(num_tokens / reference.seconds(lens))
        value = statistics.median(ours)
        return [
            Figure(
                name=name,
                value=value,
                unit="tokens/s",
                runs=self._runs,
                reference=statistics.median(speeds),
                reference_name=reference_name,
                target=targets.get(reference_name),
            )
            for reference_name, speeds in theirs.items()
        ]

    async def _seconds(self, lens: Sequence[tuple[int, int]]) -> float:
        """Time from the first submit until the last token of all requests, with prompts nobody has seen before."""
        requests = []
        for prompt_tokens, output_tokens in lens:
            self._num_requests += 1
            requests.append(
                EngineRequest(
                    request_id=str(self._num_requests),
                    prompt_token_ids=[self._random.randrange(1, checkpoint.VOCAB) for _ in range(prompt_tokens)],
                    sampling=SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True),
                )
            )
        started = time.perf_counter()
        for request in requests:
            self._engine.submit(request)

        async def read(request: EngineRequest) -> int:
            return len([event async for event in self._engine.stream(request.request_id)])

        counts = await asyncio.gather(*(read(request) for request in requests))
        seconds = time.perf_counter() - started
        assert counts == [output for _, output in lens], "a request ended early"
        return seconds


def _attention_figure(runs: int, dtype: torch.dtype) -> Figure:
    """One layer's decode attention of 16 ragged sequences from the paged pool: ours at once, the reference sequence by sequence.

    The reference gathers each sequence's blocks and calls scaled_dot_product_attention with the query heads of a KV head folded into
    query rows, which is how one would do it without a paged kernel.
    """
    contexts = [prompt for prompt, _ in RAGGED]
    layout = KVLayout(
        num_layers=checkpoint.LAYERS, num_kv_heads=checkpoint.KV_HEADS, block_size=64, head_dim=checkpoint.HEAD_DIM, dtype=dtype
    )
    tables, num_blocks = [], 0
    for context in contexts:
        count = -(-context // layout.block_size)
        tables.append(list(range(num_blocks, num_blocks + count)))
        num_blocks += count
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(num_blocks, *layout.block_shape).normal_(generator=generator).to(dtype)
    query = torch.empty(len(contexts), checkpoint.HEADS, layout.head_dim).normal_(generator=generator).to(dtype)
    scale = layout.head_dim**-0.5
    backend = kernels.backend_for(pool.device)
    plan = backend.plan_attention(
        block_tables=tables,
        query_lens=[1] * len(contexts),
        context_lens=contexts,
        layout=layout,
        num_heads=checkpoint.HEADS,
        device=pool.device,
    )
    table_tensors = [torch.tensor(table) for table in tables]

    def ours() -> torch.Tensor:
        return torch.stack([backend.paged_attention(query, pool, layer, plan, scale=scale) for layer in range(layout.num_layers)])

    def reference() -> torch.Tensor:
        layers = []
        for layer in range(layout.num_layers):
            outputs = []
            for row, table, context in zip(query, table_tensors, contexts, strict=True):
                cells = pool[table, layer].transpose(0, 1).flatten(1, 2)[:, :context]  # [Hk, C, 2 D]
                folded = row.view(1, layout.num_kv_heads, -1, layout.head_dim)
                key, value = cells[None, ..., : layout.head_dim], cells[None, ..., layout.head_dim :]
                outputs.append(F.scaled_dot_product_attention(folded, key, value, scale=scale).reshape(-1, layout.head_dim))
            layers.append(torch.stack(outputs))
        return torch.stack(layers)

    with torch.inference_mode():
        difference = float((ours().float() - reference().float()).abs().max())
        assert difference < (1e-4 if dtype == torch.float32 else 3e-2), difference
        speeds: dict[str, list[float]] = {"ours": [], "reference": []}
        for _ in range(max(runs, 5) * 4):  # single calls are short; more of them for a steady median
            for name, function in (("ours", ours), ("reference", reference)):
                started = time.perf_counter()
                function()
                speeds[name].append(layout.num_layers * len(contexts) / (time.perf_counter() - started))
    return Figure(
        name="decode attention, 16 ragged",
        value=statistics.median(speeds["ours"]),
        unit="sequences/s per layer",
        runs=len(speeds["ours"]),
        reference=statistics.median(speeds["reference"]),
        reference_name="gather + SDPA",
        target=1.5,
    )
