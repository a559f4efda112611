"""The engine without threads: requests in, one step at a time, token events out. Everything that decides anything is here or below.

Knows nothing of event loops; engine.py runs it on a thread of its own. Two runs of the same calls give the same events.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.core.errors import InvalidRequest
from services.core.noise import choice_seed, draw_seed
from services.core.prefix_hash import KEY_BYTES, prefix_key
from services.core.types import FinishReason, TokenEvent, check_token_id
from services.engine.batch import StepBatch
from services.engine.block_pool import BlockPool
from services.engine.model_runner import ModelRunner
from services.engine.sampler import SampledToken, SampleRow
from services.engine.scheduler import ScheduledChunk, Scheduler
from services.engine.sequence import EngineRequest, Sequence
from services.engine.settings import EngineSettings

# A cancel takes effect between steps, and must within a second: prompts are cut into smaller chunks when a step takes longer than this.
LONG_STEP_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the start and gauges of now; blocks obey free + cached + owned + quarantined == total."""

    num_running: int
    num_waiting: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_owned: int
    blocks_quarantined: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    preemptions: int
    evictions: int
    partial_prefills: int
    largest_batch: int
    step_s: float
    model_s: float


class EngineCore:
    """One model, one pool, one scheduler. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        runner: ModelRunner,
        settings: EngineSettings,
        *,
        model_fingerprint: bytes,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._settings = settings
        self._clock = clock
        self.vocab_size = runner.decoder.config.vocab_size
        # Some checkpoints name ids that they cannot produce.
        self._eos_token_ids = frozenset(token_id for token_id in eos_token_ids if 0 <= token_id < self.vocab_size)
        self.pool = BlockPool(runner.num_blocks)
        self.max_model_len = max_model_len
        self.prefix_key = prefix_key(model_fingerprint=model_fingerprint)
        self.scheduler = Scheduler(
            self.pool,
            block_size=settings.block_size,
            max_num_seqs=settings.max_num_seqs,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
        )
        self._arrivals = 0
        self._steps = self._prefill_tokens = self._decode_tokens = self._partial_prefills = self._largest_batch = 0
        self._step_s = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def validate(self, request: EngineRequest) -> None:
        """Raises InvalidRequest for anything about the request that this engine could never serve. Reads only constants."""
        prompt_length = len(request.prompt_token_ids)
        if prompt_length == 0:
            raise InvalidRequest("prompt", "is empty", limit=1)
        if prompt_length >= self.max_model_len:
            raise InvalidRequest(
                "prompt",
                f"has {prompt_length} tokens; the model takes {self.max_model_len} with at least one new token",
                limit=self.max_model_len - 1,
            )
        for token_id in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
            check_token_id("prompt", token_id, self.vocab_size)
        request.sampling.validate(vocab_size=self.vocab_size)
        if request.prefix_key is not None and len(request.prefix_key) != KEY_BYTES:
            raise InvalidRequest("prefix_key", f"has {len(request.prefix_key)} bytes, not {KEY_BYTES}", limit=KEY_BYTES)
        room = self.max_model_len - prompt_length
        if request.sampling.max_tokens is not None and request.sampling.max_tokens > room:
            raise InvalidRequest(
                "max_tokens",
                f"{request.sampling.max_tokens} new tokens after a prompt of {prompt_length} exceed the model's {self.max_model_len}",
                limit=room,
            )

    def add(self, request: EngineRequest) -> None:
        """Queues a valid request. Its further choices join when the prompt has been computed."""
        params = request.sampling
        prompt = list(request.prompt_token_ids)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        self.scheduler.add(
            Sequence(
                request_id=request.request_id,
                choice=0,
                order=(self._arrivals, 0),
                tokens=prompt,
                prompt_length=len(prompt),
                max_tokens=params.max_tokens or self.max_model_len - len(prompt),
                sampling=params,
                seed=draw_seed() if params.seed is None else params.seed,
                stop_ids=stop_ids,
                prefix_key=request.prefix_key or self.prefix_key,
            )
        )
        self._arrivals += 1

    def abort(self, request_id: str) -> None:
        """Drops a request and frees its blocks; unknown ids are ignored, for an abort may cross the request's own end."""
        self.scheduler.abort(request_id)

    def step(self) -> list[TokenEvent]:
        """Computes one step; call only when has_work. Every event carries one token."""
        started = self._clock()
        chunks = self.scheduler.schedule()
        rows, samplers = self._sample_rows(chunks)
        sampled = self._runner.execute(self._batch(chunks), rows)
        for chunk in chunks:
            self.scheduler.computed(chunk)
        events = [self._append(sequence, token) for sequence, token in zip(samplers, sampled, strict=True)]
        self._account(chunks, self._clock() - started)
        return events

    def calibrate(self) -> None:
        """Computes a prompt and a token in the still empty pool, to begin with chunks that keep steps short on this machine.

        Whatever is compiled or allocated by a first call is so before the first request.
        """
        assert self.pool.num_free == self.pool.num_blocks
        num_tokens = min(self._settings.block_size, self.max_model_len)
        prompt, token = _trial_batch(np.arange(num_tokens)), _trial_batch(np.arange(num_tokens - 1, num_tokens))
        for batch in (prompt, token):
            self._runner.execute(batch, [])
        started = self._clock()
        self._runner.execute(prompt, [])
        affordable = int(LONG_STEP_S * num_tokens / max(self._clock() - started, 1e-6))
        self.scheduler.prefill_chunk_tokens = min(max(affordable, self._settings.block_size), self._settings.prefill_chunk_tokens)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            blocks_total=self.pool.num_blocks,
            blocks_free=self.pool.num_free,
            blocks_cached=self.pool.num_cached,
            blocks_owned=self.pool.num_owned,
            blocks_quarantined=self.pool.num_quarantined,
            steps=self._steps,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            cached_tokens=self.scheduler.num_cached_tokens,
            preemptions=self.scheduler.num_preemptions,
            evictions=self.pool.num_evictions,
            partial_prefills=self._partial_prefills,
            largest_batch=self._largest_batch,
            step_s=self._step_s,
            model_s=self._runner.model_s,
        )

    def _batch(self, chunks: list[ScheduledChunk]) -> StepBatch:
        block_size = self._settings.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.num_computed
            end = start + chunk.num_tokens
            token_ids.extend(sequence.tokens[start:end])
            positions.extend(range(start, end))
            slots.extend(sequence.block_ids[p // block_size] * block_size + p % block_size for p in range(start, end))
            if end == len(sequence.tokens):
                logit_rows.append(len(token_ids) - 1)
        return StepBatch(
            token_ids=np.array(token_ids, dtype=np.int64),
            positions=np.array(positions, dtype=np.int64),
            slots=np.array(slots, dtype=np.int64),
            query_lens=[chunk.num_tokens for chunk in chunks],
            context_lens=[chunk.sequence.num_computed + chunk.num_tokens for chunk in chunks],
            block_tables=[chunk.sequence.block_ids for chunk in chunks],
            logit_rows=np.array(logit_rows, dtype=np.int64),
        )

    def _sample_rows(self, chunks: list[ScheduledChunk]) -> tuple[list[SampleRow], list[Sequence]]:
        """A row for every sequence whose last token this step computes, and one for each further choice that starts there."""
        rows: list[SampleRow] = []
        samplers: list[Sequence] = []
        logit_row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.num_tokens < sequence.num_uncomputed:
                self._partial_prefills += 1
                continue
            group = [sequence]
            if sequence.choice == 0 and sequence.num_output_tokens == 0:
                group += [_further_choice(sequence, choice) for choice in range(1, sequence.sampling.n)]
            for member in group:
                rows.append(_sample_row(member, logit_row))
                samplers.append(member)
            logit_row += 1
        return rows, samplers

    def _append(self, sequence: Sequence, token: SampledToken) -> TokenEvent:
        """Adds a sampled token to its sequence and ends, queues or keeps it."""
        is_new_choice = sequence.choice > 0 and sequence.num_output_tokens == 0
        sequence.tokens.append(token.token_id)
        finish_reason = None
        if token.token_id in sequence.stop_ids and sequence.num_output_tokens > sequence.sampling.min_tokens:
            finish_reason = FinishReason.STOP
        elif sequence.num_output_tokens >= sequence.max_tokens:
            finish_reason = FinishReason.LENGTH
        if finish_reason is None and is_new_choice:
            self.scheduler.add(sequence)  # finds its prompt in the prefix cache, all but the last partial block
        elif finish_reason is not None and not is_new_choice:
            self.scheduler.finish(sequence)
        return TokenEvent(
            request_id=sequence.request_id,
            choice=sequence.choice,
            token_id=token.token_id,
            position=len(sequence.tokens) - 1,
            logprobs=token.logprobs,
            finish_reason=finish_reason,
            cached_tokens=sequence.cached_tokens or 0,
        )

    def _account(self, chunks: list[ScheduledChunk], seconds: float) -> None:
        self._steps += 1
        self._step_s += seconds
        self._largest_batch = max(self._largest_batch, len(chunks))
        prefill_tokens = sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1)
        self._prefill_tokens += prefill_tokens
        self._decode_tokens += sum(chunk.num_tokens == 1 for chunk in chunks)
        scheduler, most = self.scheduler, self._settings.prefill_chunk_tokens
        if prefill_tokens and seconds > LONG_STEP_S:
            scheduler.prefill_chunk_tokens = max(scheduler.prefill_chunk_tokens // 2, min(self._settings.block_size, most))
        elif prefill_tokens and seconds < LONG_STEP_S / 4:
            scheduler.prefill_chunk_tokens = min(scheduler.prefill_chunk_tokens * 2, most)


def _trial_batch(positions: npt.NDArray[np.int64]) -> StepBatch:
    """The given positions of one sequence that owns block 0."""
    return StepBatch(
        token_ids=np.zeros_like(positions),
        positions=positions,
        slots=positions,
        query_lens=[len(positions)],
        context_lens=[int(positions[-1]) + 1],
        block_tables=[[0]],
        logit_rows=np.empty(0, dtype=np.int64),
    )


def _further_choice(first: Sequence, choice: int) -> Sequence:
    """Choice 1 … n - 1 of a request whose prompt has just been computed for choice 0."""
    return Sequence(
        request_id=first.request_id,
        choice=choice,
        order=(first.order[0], choice),
        tokens=list(first.tokens),
        prompt_length=first.prompt_length,
        max_tokens=first.max_tokens,
        sampling=first.sampling,
        seed=choice_seed(first.seed, choice),
        stop_ids=first.stop_ids,
        prefix_key=first.prefix_key,
        cached_tokens=first.cached_tokens,
    )


def _sample_row(sequence: Sequence, logit_row: int) -> SampleRow:
    held_back = sequence.stop_ids if sequence.num_output_tokens < sequence.sampling.min_tokens else frozenset[int]()
    return SampleRow(
        logit_row=logit_row,
        params=sequence.sampling,
        seed=sequence.seed,
        position=len(sequence.tokens),
        tokens=sequence.tokens,
        prompt_length=sequence.prompt_length,
        held_back=held_back,
    )
