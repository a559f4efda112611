"""How fast workers are as processes: what requests through a mesh with nothing else to do take, by their own timing records.

The engine by itself is faster: in a process it shares a processor with the event loop that sends what it makes. Each observation is of a
prompt, or of a batch that decodes:

    prompt    steps × constant + per token × n + per pair × n²        n tokens, none of them cached: Σ new (new + 2 done) over its chunks
    decode    constant + per sequence × sequences + per block × blocks that they read
    overhead  from the client's send to its first token, less the prompt's computing: calls and wake-ups; and, apart from these, the call of
              prefill and the blocks' way back, which a prompt that decode computes has not
"""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from protos.baton.v1 import common_pb2, inference_pb2
from services.cli.remote import Ended, RouterClient
from services.cli.worker_profile import Observation
from services.mesh import convert

TIMEOUT_S = 120.0
OUTPUT_TOKENS = 32
BATCHES = (1, 2, 4, 8)
SHORTEST = 16


@dataclass(slots=True)
class MeshProfile:
    """overheads_s: of each prompt that was alone; remote_overheads_s: those parts of it that a prompt computed on decode has not."""

    prefill: list[Observation] = field(default_factory=list)
    decode: list[Observation] = field(default_factory=list)
    overheads_s: list[float] = field(default_factory=list)
    remote_overheads_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Answer:
    ended: Ended
    ttft_s: float
    tpot_s: float


async def profile_mesh(router: str, *, rounds: int, chunk_tokens: int, block_size: int, vocab_size: int, max_model_len: int) -> MeshProfile:
    """Measures a mesh that has nothing else to do. Raises what its calls raise."""
    found, draw = MeshProfile(), random.Random(0)
    longest = min(max_model_len - OUTPUT_TOKENS, 4 * chunk_tokens)
    lengths = [longest >> shift for shift in range(8) if longest >> shift >= SHORTEST]
    async with RouterClient(router) as client:

        async def ask(length: int) -> _Answer:
            return await _ask(client, [draw.randrange(vocab_size) for _ in range(length)])

        await ask(longest)  # connections, the router's estimates, the engines' chunk size
        for _ in range(rounds):
            for length in lengths:
                answer = await ask(length)
                timing = answer.ended.timing
                prefill_s, remote_s = timing.prefill_s, timing.to_prefill_s + timing.prefill_return_s + timing.transfer_tail_s
                found.prefill.append(((float(-(-length // chunk_tokens)), float(length), float(length * length)), prefill_s))
                found.overheads_s.append(max(0.0, answer.ttft_s - prefill_s - remote_s))
                found.remote_overheads_s.append(remote_s)
            for size in BATCHES:
                for length in (lengths[-1], lengths[len(lengths) // 2]):
                    answers = await asyncio.gather(*(ask(length) for _ in range(size)))
                    blocks = size * (length + OUTPUT_TOKENS / 2) / block_size
                    found.decode.append(((1.0, float(size), blocks), statistics.median(answer.tpot_s for answer in answers)))
    return found


async def _ask(client: RouterClient, prompt: Sequence[int]) -> _Answer:
    request = inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(token_ids=convert.token_ids_to_proto(prompt)),
        sampling=common_pb2.SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True),
        include_timing=True,
    )
    times: list[float] = []

    def note(response: inference_pb2.GenerateResponse) -> None:
        if response.token_ids.packed:
            times.append(time.perf_counter())

    sent = time.perf_counter()
    ended = await client.generate(request, timeout_s=TIMEOUT_S, show=note)
    return _Answer(ended, times[0] - sent, (times[-1] - times[0]) / (OUTPUT_TOKENS - 1))
