"""How fast one worker's engine is: steps measured in process, and the two shapes that are fitted to them.

    prefill step   constant + per token × n + per pair × n (n + 2 c)          n prompt tokens computed behind c that are there already
    decode step    constant + per sequence × sequences + per block × blocks that they read

No network and no event loop: what calls and transfers add to a request is not measured here. The seconds of a step are those of
EngineCore.step: scheduling, model and sampling; of steps of one kind the median counts, for other processes may hold one up.
"""

import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from services.core.types import SamplingParams
from services.engine.core import EngineCore
from services.engine.sequence import EngineRequest
from services.router.cost_model import PRIOR_PREFILL, PRIOR_STEP, RelativeFit

FORMAT = "baton.worker/1"
DECODE_STEPS = 8  # of each batch
MAX_OUTPUT_TOKENS = 64  # of each sequence: it waits, decoding, until the prompts of the others have been computed
Observation = tuple[tuple[float, ...], float]  # features of a step, its seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Seconds by feature, in the order of this module's text, and how far steps were from what they say, relatively."""

    seconds: tuple[float, ...]
    num_kinds: int
    median_error: float
    p90_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProfile:
    """
    chunk_tokens     prompt tokens that a step takes at most, as the engine has settled on here
    block_bytes      of one KV block, over all layers
    prefill, decode  of the worker; engine_prefill, engine_decode: of its engine by itself, where the others are of processes
    overhead_s       what calls add to a first token; remote_overhead_s: more, when prefill computes the prompt
    """

    model: str
    hardware: str
    block_size: int
    num_blocks: int
    chunk_tokens: int
    max_num_seqs: int
    block_bytes: int
    vocab_size: int
    max_model_len: int
    prefill: Fit
    decode: Fit
    overhead_s: float = 0.0
    remote_overhead_s: float = 0.0
    engine_prefill: Fit | None = None
    engine_decode: Fit | None = None
    format: str = FORMAT

    def in_processes(
        self,
        *,
        prefill: Sequence[Observation],
        decode: Sequence[Observation],
        overheads_s: Sequence[float],
        remote_overheads_s: Sequence[float],
    ) -> "WorkerProfile":
        """The same workers as parts of a mesh; what the engine does alone stays beside it."""
        return replace(
            self,
            prefill=_fit(prefill, PRIOR_PREFILL),
            decode=_fit(decode, PRIOR_STEP),
            overhead_s=statistics.median(overheads_s),
            remote_overhead_s=statistics.median(remote_overheads_s),
            engine_prefill=self.prefill,
            engine_decode=self.decode,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def profile_worker(core: EngineCore, *, rounds: int, hardware: str, model: str) -> WorkerProfile:
    """Measures an engine that has nothing to do; leaves it so."""
    draw = random.Random(0)
    prefill: list[Observation] = []
    decode: list[Observation] = []
    for _ in range(rounds):
        prefill += _prefill_steps(core, draw)
        decode += _decode_steps(core, draw)
    return WorkerProfile(
        model=model,
        hardware=hardware,
        block_size=core.block_size,
        num_blocks=core.pool.num_blocks,
        chunk_tokens=core.scheduler.prefill_chunk_tokens,
        max_num_seqs=core.scheduler.max_num_seqs,
        block_bytes=core.block_bytes,
        vocab_size=core.vocab_size,
        max_model_len=core.max_model_len,
        prefill=_fit(prefill, PRIOR_PREFILL),
        decode=_fit(decode, PRIOR_STEP),
    )


def _prefill_steps(core: EngineCore, draw: random.Random) -> Iterator[Observation]:
    """Prompts of one chunk and less, and long ones whose later chunks read what is there."""
    longest = min(core.max_model_len - 1, 8 * core.scheduler.prefill_chunk_tokens)
    for length in (longest // 64, longest // 32, longest // 16, longest // 8, longest // 4, longest // 2, longest):
        _submit(core, draw, max(1, length), 1)
        done = 0
        while core.has_work:
            before = core.stats().prefill_tokens
            seconds = _step_s(core)
            new = core.stats().prefill_tokens - before
            yield (1.0, float(new), float(new * (new + 2 * done))), seconds
            done += new


def _decode_steps(core: EngineCore, draw: random.Random) -> Iterator[Observation]:
    """Batches of several sizes and lengths, as far as they fit the pool."""
    most = min(core.max_model_len - MAX_OUTPUT_TOKENS, 16 * core.block_size)
    for size in (1, 2, 4, 8, 16, 32):
        for length in (most // 8, most // 2, most):
            blocks = -(-(length + MAX_OUTPUT_TOKENS) // core.block_size)
            if length > 0 and size <= core.scheduler.max_num_seqs and size * blocks <= core.pool.num_blocks:
                yield from _decode_batch(core, [_submit(core, draw, length, MAX_OUTPUT_TOKENS) for _ in range(size)])


def _decode_batch(core: EngineCore, request_ids: Sequence[str]) -> Iterator[Observation]:
    """The median of the first steps in which all of them decode; none when the first has ended before the last has begun."""
    blocks: list[float] = []
    seconds: list[float] = []
    while core.has_work and len(seconds) < DECODE_STEPS:
        before = core.stats()
        context_tokens = sum(sequence.num_computed for sequence in core.scheduler.running)
        took_s = _step_s(core)
        after = core.stats()
        if after.prefill_tokens == before.prefill_tokens and after.decode_tokens - before.decode_tokens == len(request_ids):
            blocks.append(context_tokens / core.block_size)
            seconds.append(took_s)
    for request_id in request_ids:
        core.abort(request_id)
    if seconds:
        yield (1.0, float(len(request_ids)), statistics.median(blocks)), statistics.median(seconds)


def _submit(core: EngineCore, draw: random.Random, length: int, max_tokens: int) -> str:
    """A prompt that shares nothing with any other; returns the request's id."""
    request = EngineRequest(
        request_id=f"{draw.getrandbits(64):016x}",
        prompt_token_ids=[draw.randrange(core.vocab_size) for _ in range(length)],
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0),
    )
    core.validate(request)
    core.add(request)
    return request.request_id


def _step_s(core: EngineCore) -> float:
    started = time.perf_counter()
    core.step()
    return time.perf_counter() - started


def _fit(steps: Sequence[Observation], prior: tuple[float, ...]) -> Fit:
    by_kind: dict[tuple[float, ...], list[float]] = {}
    for features, seconds in steps:
        by_kind.setdefault(features, []).append(seconds)
    kinds = [(features, statistics.median(seconds)) for features, seconds in by_kind.items()]
    # It forgets, and solves anew at every sixteenth observation: often enough that all kinds are in it, and the last one is such a one.
    fit, order = RelativeFit(prior), random.Random(1)
    for features, seconds in order.choices(kinds, k=1024):
        fit.observe(features, seconds)
    errors = [abs(sum(c * f for c, f in zip(fit.coefficients, features, strict=True)) / seconds - 1.0) for features, seconds in kinds]
    return Fit(
        seconds=fit.coefficients,
        num_kinds=len(kinds),
        median_error=statistics.median(errors),
        p90_error=statistics.quantiles(errors, n=10, method="inclusive")[-1],
    )
