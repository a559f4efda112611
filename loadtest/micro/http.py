"""`micro http`: tokens/s, TTFT and ITL through the OpenAI face, beside the engine in this process on the same checkpoint.

One worker does both phases; then a prefill and a decode worker. Closed loop at each concurrency, random prompts, streamed. With an
interpreter that has vLLM its server is asked by the same client in turn. All servers stand idle while another one is measured.
"""

import asyncio
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loadtest.micro import checkpoint
from loadtest.micro.figure import Figure
from loadtest.micro.http_client import Reply, complete, request_body
from loadtest.micro.processes import free_port, service, wait_for_workers
from services.core.types import SamplingParams
from services.engine.demo import TARGET_DIR
from services.engine.engine import Engine
from services.engine.loader import load_model
from services.engine.sequence import EngineRequest
from services.engine.settings import EngineSettings
from services.mesh.child_process import bound_to_parent

PROMPT_TOKENS = OUTPUT_TOKENS = 128
# Requests of one measurement, by how many run at a time.
REQUESTS = {1: 4, 8: 24, 32: 64}
ENGINE = "the engine in process"
ONE_WORKER, TWO_WORKERS, VLLM = "http, one worker", "http, prefill + decode", "vllm server"
SMALL_REQUESTS = 20
VLLM_START_S = 300.0
# What vLLM 0.32's CPU server did elsewhere, the better of eager and compiled; a machine like that is needed to compare with.
VLLM_ELSEWHERE = {1: 203.0, 8: 821.0, 32: 1121.0}

Ask = Callable[[Sequence[int]], Awaitable[Reply]]


@dataclass(slots=True)
class Samples:
    """Of one way to ask, at one concurrency, one entry for each measurement."""

    tokens_per_s: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)


def measure(*, runs: int, vllm_python: Path | None = None) -> tuple[list[Figure], dict[str, object]]:
    """All figures, and their conditions."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        directory = Path(scratch)
        checkpoint.make_checkpoint(directory)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TARGET_DIR / name, directory)
        addresses = {way: stack.enter_context(_mesh(directory, with_prefill=way == TWO_WORKERS)) for way in (ONE_WORKER, TWO_WORKERS)}
        if vllm_python is not None:
            addresses[VLLM] = stack.enter_context(_vllm(vllm_python, directory))
        loaded = load_model(directory, EngineSettings())
        figures = asyncio.run(_measure(Engine(loaded.core, max_num_requests=64), addresses, runs))
    conditions: dict[str, object] = {
        "prompt and output tokens": PROMPT_TOKENS,
        "dtype": str(loaded.dtype),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    if vllm_python is not None:
        conditions["vllm dtype"] = _faster_dtype()
    return figures, conditions


@contextlib.contextmanager
def _mesh(directory: Path, *, with_prefill: bool) -> Iterator[str]:
    """The HTTP address of a router over one decode worker, and a prefill worker through which all prompts go."""
    http = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        decode = stack.enter_context(service("decode", worker_id="decode-0", model=directory))
        workers = [f"decode=decode-0@{decode.address}"]
        if with_prefill:
            prefill = stack.enter_context(service("prefill", worker_id="prefill-0", model=directory))
            workers.append(f"prefill=prefill-0@{prefill.address}")
        router = service("router", model=directory, workers=",".join(workers), max_local_tokens=0, http_listen=http, served_model_name="m")
        address = stack.enter_context(router).address
        asyncio.run(wait_for_workers(address, len(workers)))
        yield http


@contextlib.contextmanager
def _vllm(interpreter: Path, directory: Path) -> Iterator[str]:
    """vLLM's own server on the same checkpoint, as it comes, but for prefix caching (no prompt comes twice) and its logs."""
    port = free_port()
    options = ["--model", str(directory), "--served-model-name", "m", "--port", str(port), "--max-model-len", str(checkpoint.CONTEXT)]
    options += ["--no-enable-prefix-caching", "--disable-log-stats", "--dtype", _faster_dtype()]
    command = bound_to_parent([str(interpreter), "-m", "vllm.entrypoints.openai.api_server", *options])
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.DEVNULL, stderr=sys.stderr) as process:
        try:
            deadline = time.monotonic() + VLLM_START_S
            while not _is_healthy(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("vLLM's server does not start")
                time.sleep(1.0)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def _faster_dtype() -> str:
    """For a server that computes in one dtype: without instructions for bf16, emulating it is several times slower than fp32."""
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0):
            return True
    except (urllib.error.URLError, OSError):
        return False


async def _measure(engine: Engine, addresses: dict[str, str], runs: int) -> list[Figure]:
    async with engine:
        ways: dict[str, Ask] = {ENGINE: _ask_engine(engine), **{way: _ask_http(address) for way, address in addresses.items()}}
        samples = {way: {concurrency: Samples() for concurrency in REQUESTS} for way in ways}
        for ask in ways.values():
            await _run(ask, 4, 4)  # warm up
        for concurrency, count in REQUESTS.items():
            for _ in range(runs):
                for way, ask in ways.items():
                    await _sample(ask, concurrency, count, samples[way][concurrency])
        small_ms = [await _small_ms(addresses[ONE_WORKER]) for _ in range(SMALL_REQUESTS * runs)]
    figures = [figure for concurrency in REQUESTS for way in addresses for figure in _figures(way, concurrency, samples, runs)]
    slowest = Figure(
        name=f"slowest of {SMALL_REQUESTS} answers of one token in a row, not streamed",
        value=statistics.median(max(small_ms[i : i + SMALL_REQUESTS]) for i in range(0, len(small_ms), SMALL_REQUESTS)),
        unit="ms",
        runs=runs,
        reference=statistics.median(small_ms),
        reference_name="median of them",
        target=40.0,
        at_most=True,
        on_ratio=False,
    )
    return [*figures, slowest]


def _figures(way: str, concurrency: int, samples: dict[str, dict[int, Samples]], runs: int) -> list[Figure]:
    ours, engine = samples[way][concurrency], samples[ENGINE][concurrency]
    name = f"{way}, {concurrency} at a time"
    figures = [
        Figure(
            name=name,
            value=statistics.median(ours.tokens_per_s),
            unit="tokens/s",
            runs=runs,
            reference=statistics.median(engine.tokens_per_s),
            reference_name=ENGINE,
            target=0.9 if way == ONE_WORKER else None,
        )
    ]
    if way == ONE_WORKER:
        elsewhere = Figure(
            name=f"  {name}, absolute",
            value=statistics.median(ours.tokens_per_s),
            unit="tokens/s",
            runs=runs,
            target=VLLM_ELSEWHERE[concurrency],
            on_ratio=False,
        )
        figures.append(elsewhere)
        if VLLM in samples:
            vllm = statistics.median(samples[VLLM][concurrency].tokens_per_s)
            value = statistics.median(ours.tokens_per_s)
            figures.append(
                Figure(name=f"  {name}", value=value, unit="tokens/s", runs=runs, reference=vllm, reference_name=VLLM, target=1.0)
            )
    for title, attribute in (("TTFT p50", "ttft_ms"), ("ITL p50", "itl_ms")):
        value, reference = statistics.median(getattr(ours, attribute)), statistics.median(getattr(engine, attribute))
        figures.append(Figure(name=f"  {title}", value=value, unit="ms", runs=runs, reference=reference, reference_name=ENGINE))
    return figures


async def _sample(ask: Ask, concurrency: int, count: int, samples: Samples) -> None:
    started = time.perf_counter()
    replies = await _run(ask, concurrency, count)
    seconds = time.perf_counter() - started
    samples.tokens_per_s.append(count * OUTPUT_TOKENS / seconds)
    samples.ttft_ms.append(statistics.median(reply.ttft_s for reply in replies) * 1e3)
    samples.itl_ms.append(statistics.median(gap for reply in replies for gap in reply.gaps_s) * 1e3)


async def _run(ask: Ask, concurrency: int, count: int) -> list[Reply]:
    """So many requests, so many at a time: the next one starts when one ends."""
    prompts = iter([[random.randrange(300, checkpoint.VOCAB) for _ in range(PROMPT_TOKENS)] for _ in range(count)])

    async def client() -> list[Reply]:
        return [await ask(prompt) for prompt in prompts]

    replies = [reply for some in await asyncio.gather(*[client() for _ in range(concurrency)]) for reply in some]
    for reply in replies:
        if reply.tokens != OUTPUT_TOKENS or reply.error:
            raise RuntimeError(f"a request gave {reply.tokens} tokens: {reply.status} {reply.error}")
    return replies


def _ask_http(address: str) -> Ask:
    async def ask(prompt: Sequence[int]) -> Reply:
        return await complete(address, request_body(prompt, OUTPUT_TOKENS, model="m"))

    return ask


def _ask_engine(engine: Engine) -> Ask:
    sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)

    async def ask(prompt: Sequence[int]) -> Reply:
        reply, started = Reply(), time.perf_counter()
        request_id = str(random.getrandbits(64))
        engine.submit(EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling))
        async for _ in engine.stream(request_id):
            reply.token_times.append(time.perf_counter() - started)
        reply.tokens = len(reply.token_times)
        return reply

    return ask


async def _small_ms(address: str) -> float:
    prompt = [random.randrange(300, checkpoint.VOCAB) for _ in range(4)]
    return (await complete(address, request_body(prompt, 1, model="m", stream=False))).total_s * 1e3
