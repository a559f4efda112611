"""The engine without threads: requests in, one step at a time, events out. Everything that decides anything is here or below.

Knows nothing of event loops; engine.py runs it on a thread of its own. Two runs of the same calls give the same events.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens

import numpy as np

from services.core.errors import InvalidRequest
from services.core.noise import draw_seed
from services.core.prefix_hash import KEY_BYTES, prefix_key
from services.core.types import FinishReason, PrefillTiming, SampledToken, SamplingParams, TokenEvent, TokenLogprobs, check_token_id
from services.engine.block_pool import BlockPool
from services.engine.events import Event, PrefillProgress, Reserved
from services.engine.kv_cache import KVCache
from services.engine.model_runner import ModelRunner
from services.engine.outside_view import OutsideView
from services.engine.pacing import ChunkPacer
from services.engine.scheduler import ScheduledChunk, Scheduler
from services.engine.sequence import EngineRequest, Purpose, Sequence
from services.engine.settings import EngineSettings
from services.engine.stats import EngineStats, Room
from services.engine.step import further_choices, make_batch, step_rows, trial_batch
from services.engine.timing import PrefillWatch


class EngineCore:
    """One model, its pools, one scheduler. Not thread-safe: one thread at a time calls it."""

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
        self._clock = clock
        self.vocab_size = runner.decoder.config.vocab_size
        self.block_size = settings.block_size
        self.block_bytes = sum(layout.block_bytes for layout in runner.layouts)
        self.groups = runner.groups
        self.model_fingerprint = model_fingerprint
        self.layout_fingerprint = runner.layout_fingerprint(model_fingerprint)
        # Some checkpoints name ids that they cannot produce.
        self._eos_token_ids = frozenset(token_id for token_id in eos_token_ids if 0 <= token_id < self.vocab_size)
        cache = KVCache(runner.num_blocks, runner.groups, chunk_tokens=settings.prefill_chunk_tokens)
        self.pools = cache.pools
        self.max_model_len = max_model_len
        self.prefix_key = prefix_key(model_fingerprint=model_fingerprint)
        self._outside = OutsideView(runner)
        self.scheduler = Scheduler(
            cache,
            max_num_seqs=settings.max_num_seqs,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
        )
        self._pacer = ChunkPacer(block_size=settings.block_size, most=settings.prefill_chunk_tokens)
        self._arrivals = 0
        self._steps = self._prefill_tokens = self._decode_tokens = self._partial_prefills = self._largest_batch = 0
        self._step_s = 0.0

    @property
    def pool(self) -> BlockPool:
        """Of the first KV group: of the layers that keep all tokens, if there are any. The prefix index hears of its blocks."""
        return self.pools[0]

    @property
    def has_work(self) -> bool:
        """Whether step() would do anything. If not, only another call can change that, even if requests wait."""
        return self.scheduler.has_work

    def now(self) -> float:
        return self._clock()

    def validate(self, request: EngineRequest, purpose: Purpose = Purpose.GENERATE) -> None:
        """Raises InvalidRequest for anything about the request that this engine could never serve. Reads only constants."""
        prompt_length = len(request.prompt_token_ids)
        if prompt_length == 0:
            raise InvalidRequest("prompt", "is empty", limit=1)
        if request.num_tokens >= self.max_model_len:
            raise InvalidRequest(
                "prompt",
                f"has {request.num_tokens} tokens; the model takes {self.max_model_len} with at least one new token",
                limit=self.max_model_len - 1,
            )
        for token_id in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
            check_token_id("prompt", token_id, self.vocab_size)
        request.sampling.validate(vocab_size=self.vocab_size)
        self._validate_output(request)
        if request.sampling.prompt_logprobs is not None and purpose is not Purpose.GENERATE:
            raise InvalidRequest("prompt_logprobs", "are computed only by the engine that generates")
        if request.prefix_key is not None and len(request.prefix_key) != KEY_BYTES:
            raise InvalidRequest("prefix_key", f"has {len(request.prefix_key)} bytes, not {KEY_BYTES}", limit=KEY_BYTES)
        if purpose is Purpose.PREFILL:
            return  # the tokens after the first are another engine's
        room = self.max_model_len - prompt_length
        if request.sampling.max_tokens is not None and request.sampling.max_tokens > room:
            raise InvalidRequest(
                "max_tokens",
                f"{request.sampling.max_tokens} new tokens after a prompt of {prompt_length} exceed the model's {self.max_model_len}",
                limit=room,
            )

    def _validate_output(self, request: EngineRequest) -> None:
        """Raises InvalidRequest for tokens of an earlier engine after which nothing could come."""
        num_tokens, sampling = len(request.output_token_ids), request.sampling
        if num_tokens == 0:
            return
        if sampling.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs", "come with the first token, and there is one already")
        if sampling.n > 1:
            raise InvalidRequest("n", f"is {sampling.n}, but only one choice can go on from what it has", limit=1)
        for token_id in (min(request.output_token_ids), max(request.output_token_ids)):
            check_token_id("output_token_ids", token_id, self.vocab_size)
        if num_tokens >= self._max_tokens(request):
            raise InvalidRequest("output_token_ids", f"are {num_tokens}; max_tokens allows no more", limit=self._max_tokens(request) - 1)

    def validate_first_tokens(self, request: EngineRequest, first_tokens: Tokens[SampledToken]) -> None:
        """Raises InvalidRequest unless there is one possible token for each choice. Reads only constants."""
        num_choices = request.sampling.n
        if len(first_tokens) != num_choices:
            raise InvalidRequest("first_tokens", f"{len(first_tokens)} for {num_choices} choices", limit=num_choices)
        for token in first_tokens:
            check_token_id("first_tokens", token.token_id, self.vocab_size)

    def first_events(self, request: EngineRequest, first_tokens: Tokens[SampledToken], *, cached_tokens: int) -> list[Event]:
        """What landed() makes of these valid first tokens, told from constants alone."""
        stop_ids, max_tokens = self._stop_ids(request.sampling), self._max_tokens(request)
        return [
            TokenEvent(
                request_id=request.request_id,
                choice=choice,
                token_id=token.token_id,
                position=request.num_tokens,
                logprobs=token.logprobs,
                finish_reason=_finish_reason(token.token_id, len(request.output_token_ids) + 1, request.sampling, stop_ids, max_tokens),
                cached_tokens=cached_tokens,
            )
            for choice, token in enumerate(first_tokens)
        ]

    def add(self, request: EngineRequest, purpose: Purpose = Purpose.GENERATE, *, arrived_at: float | None = None) -> None:
        """Queues a valid request. Its further choices join when the prompt has been computed, or has landed."""
        params = request.sampling
        self.scheduler.add(
            Sequence(
                request_id=request.request_id,
                choice=0,
                order=(self._arrivals, 0),
                tokens=[*request.prompt_token_ids, *request.output_token_ids],
                prompt_length=len(request.prompt_token_ids),
                num_received=len(request.output_token_ids),
                max_tokens=self._max_tokens(request),
                sampling=params,
                seed=draw_seed() if params.seed is None else params.seed,
                stop_ids=self._stop_ids(params),
                prefix_key=request.prefix_key or self.prefix_key,
                purpose=purpose,
                watch=PrefillWatch(self._clock() if arrived_at is None else arrived_at),
                prompt_logprobs=None if params.prompt_logprobs is None else [],
            )
        )
        self._arrivals += 1

    def abort(self, request_id: str) -> None:
        """Drops a request and frees its blocks; unknown ids are ignored, for an abort may cross the request's own end."""
        self.scheduler.abort(request_id)

    def landed(self, request_id: str, first_tokens: Tokens[SampledToken]) -> list[Event]:
        """The whole prompt of a reserved request is in its blocks, and these are its valid first tokens: decoding goes on here."""
        sequence = self.scheduler.reserved[request_id]
        self._outside.copy_in(sequence, len(sequence.tokens))
        first = self.scheduler.start(request_id, len(sequence.tokens))
        first.watch = None
        group = [first, *further_choices(first)]
        return [self._append(sequence, token) for sequence, token in zip(group, first_tokens, strict=True)]

    def compute_here(self, request_id: str, num_landed_tokens: int = 0) -> None:
        """Computes the prompt of a reserved request from the last block that has landed whole; nobody else writes there any more."""
        sequence = self.scheduler.reserved[request_id]
        # Landed or not, the block of the last token is computed: somebody has to make the logits.
        num_landed_tokens = min(num_landed_tokens, len(sequence.tokens) - 1)
        num_landed_tokens = num_landed_tokens // self.block_size * self.block_size
        self._outside.copy_in(sequence, num_landed_tokens)
        self.scheduler.start(request_id, num_landed_tokens)
        sequence.watch = PrefillWatch(self._clock())

    def quarantine(self, request_id: str) -> None:
        """Takes the blocks of a reserved request that are not cached out of circulation; the request waits again, to be computed here."""
        sequence = self.scheduler.quarantine(request_id)
        sequence.watch = PrefillWatch(self._clock())

    def lift_quarantine(self, block_ids: Tokens[int]) -> None:
        """Nobody writes into these blocks any more."""
        for pool, own_ids in zip(self.pools, self._outside.by_group(block_ids), strict=True):
            pool.lift_quarantine(own_ids)

    def step(self, announce: Callable[[list[Event]], None] | None = None) -> list[Event]:
        """Computes one step; call only when has_work.

        `announce` gets what admission alone has brought (Reserved, the cached part of a prefill) before the computation, so that blocks
        can travel meanwhile; without it these events come first in the result.
        """
        started = self._clock()
        chunks = self.scheduler.schedule()
        events = self._admission_events()
        if events and announce:
            announce(events)
            events = []
        if not chunks:
            return events
        model_s = self._runner.model_s
        rows = step_rows(chunks)
        batch = make_batch(chunks, self.block_size)
        sampled, scores = self._runner.execute(batch, rows.samples, rows.scores)
        self._watch(chunks, started, self._runner.model_s - model_s)
        for chunk in chunks:
            self.scheduler.computed(chunk)
            self._partial_prefills += chunk.sequence.num_uncomputed > 0
        for sequence, logprobs in zip(rows.scored, scores, strict=True):
            assert sequence.prompt_logprobs is not None
            sequence.prompt_logprobs.append(logprobs)
        handed_over: dict[str, list[SampledToken]] = {}
        prefill = Purpose.PREFILL  # reached once: a look-up in an enum costs more than all else in these loops
        for sequence, token in zip(rows.samplers, sampled, strict=True):
            if sequence.purpose is prefill:
                handed_over.setdefault(sequence.request_id, []).append(token)
            else:
                events.append(self._append(sequence, token))
        for chunk in chunks:
            if chunk.sequence.purpose is prefill:
                events.append(self._progress(chunk.sequence, handed_over.get(chunk.sequence.request_id)))
        self._account(chunks, self._clock() - started)
        return events

    def admit(self) -> list[Event]:
        """Gives waiting requests their places, where nothing is to be computed: after a reservation was added to a core without work."""
        chunks = self.scheduler.schedule()
        assert not chunks
        return self._admission_events()

    def calibrate(self) -> None:
        """Computes prompts and tokens in the still empty pools, to begin with chunks that keep steps short on this machine.

        What is compiled by a first step is so before the first request.
        """
        assert all(pool.num_free == pool.num_blocks for pool in self.pools)
        num_tokens, num_groups = min(self.block_size, self.max_model_len), len(self.pools)
        most = min(self.max_model_len, self.block_size * min(pool.num_blocks for pool in self.pools))
        for num_new in self._runner.trial_lengths:
            positions = np.arange(min(max(num_tokens, num_new), most))[-num_new:]
            self._runner.execute(trial_batch(positions, num_groups, self.block_size), [])
        prompt = trial_batch(np.arange(num_tokens), num_groups, self.block_size)
        self._runner.execute(prompt, [])
        started = self._clock()
        self._runner.execute(prompt, [])
        self._pacer.calibrate(num_tokens, self._clock() - started)
        self.scheduler.prefill_chunk_tokens = self._pacer.chunk_tokens

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_reserved=len(self.scheduler.reserved),
            num_held=len(self.scheduler.held),
            uncomputed_prompt_tokens=self.scheduler.num_uncomputed_prompt_tokens,
            room=self._room(),
            blocks_total=sum(pool.num_blocks for pool in self.pools),
            blocks_free=sum(pool.num_free for pool in self.pools),
            blocks_cached=sum(pool.num_cached for pool in self.pools),
            blocks_owned=sum(pool.num_owned for pool in self.pools),
            blocks_quarantined=sum(pool.num_quarantined for pool in self.pools),
            steps=self._steps,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            cached_tokens=self.scheduler.num_cached_tokens,
            preemptions=self.scheduler.num_preemptions,
            evictions=sum(pool.num_evictions for pool in self.pools),
            partial_prefills=self._partial_prefills,
            largest_batch=self._largest_batch,
            step_s=self._step_s,
            model_s=self._runner.model_s,
        )

    def _room(self) -> Room:
        pool = self.pool
        more = 0 if self.groups.windows[0] is None else self.groups.num_blocks(self.max_model_len)
        return Room(
            total=pool.num_blocks + more,
            free=pool.num_free + more,
            cached=pool.num_cached,
            owned=pool.num_owned,
            quarantined=pool.num_quarantined,
        )

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)

    def _max_tokens(self, request: EngineRequest) -> int:
        return request.sampling.max_tokens or self.max_model_len - len(request.prompt_token_ids)

    def _admission_events(self) -> list[Event]:
        """What the requests that were just admitted have for others to begin with."""
        events: list[Event] = []
        for sequence in self.scheduler.admitted:
            if sequence.purpose is Purpose.RECEIVE:
                assert sequence.watch is not None
                now = self._clock()
                events.append(
                    Reserved(
                        request_id=sequence.request_id,
                        block_ids=self._outside.block_ids(sequence),
                        num_cached_tokens=sequence.num_computed,
                        queue_s=now - sequence.watch.queued_at,
                        reserved_at=now,
                    )
                )
            elif sequence.purpose is Purpose.PREFILL and sequence.num_computed:
                events.append(self._progress(sequence, None))
        return events

    def _watch(self, chunks: list[ScheduledChunk], started_at: float, model_s: float) -> None:
        """Adds the step to the timing of the prompts that it computed a part of."""
        watched = [(chunk.sequence.watch, chunk.num_tokens) for chunk in chunks if chunk.sequence.watch is not None]
        if watched:
            num_tokens = sum(chunk.num_tokens for chunk in chunks)
            for watch, num_own in watched:
                watch.add_chunk(started_at, model_s * num_own / num_tokens)

    def _take_timing(self, sequence: Sequence) -> PrefillTiming | None:
        """The timing of a prompt whose first token has just been sampled."""
        if sequence.watch is None:
            return None
        timing = sequence.watch.timing(self._clock())
        sequence.watch = None
        return timing

    def _progress(self, sequence: Sequence, first_tokens: list[SampledToken] | None) -> PrefillProgress:
        """How far a prefill for others is; with its first tokens it is done, and its blocks are held."""
        timing = None
        if first_tokens is not None:
            timing = self._take_timing(sequence)
            self.scheduler.hold(sequence)
        self._outside.copy_out(sequence, len(sequence.tokens) if first_tokens is not None else sequence.num_computed)
        return PrefillProgress(
            request_id=sequence.request_id,
            num_computed_tokens=sequence.num_computed,
            block_ids=self._outside.block_ids(sequence),
            cached_tokens=sequence.cached_tokens or 0,
            first_tokens=None if first_tokens is None else tuple(first_tokens),
            timing=timing,
        )

    def _append(self, sequence: Sequence, token: SampledToken) -> TokenEvent:
        """Adds a sampled token, or one that a peer has sampled, to its sequence and ends, queues or keeps it."""
        is_new_choice = sequence.choice > 0 and sequence.num_output_tokens == 0
        sequence.tokens.append(token.token_id)
        finish_reason = _finish_reason(
            token.token_id, sequence.num_output_tokens, sequence.sampling, sequence.stop_ids, sequence.max_tokens
        )
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
            prefill=self._take_timing(sequence),
            prompt_logprobs=_take_prompt_logprobs(sequence),
        )

    def _account(self, chunks: list[ScheduledChunk], seconds: float) -> None:
        self._steps += 1
        self._step_s += seconds
        self._largest_batch = max(self._largest_batch, len(chunks))
        prefill_tokens = sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1)
        self._prefill_tokens += prefill_tokens
        self._decode_tokens += sum(chunk.num_tokens == 1 for chunk in chunks)
        if prefill_tokens:
            self._pacer.took(seconds)
            self.scheduler.prefill_chunk_tokens = self._pacer.chunk_tokens


def _take_prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprobs, ...] | None:
    """Those of a prompt whose first token has just been sampled; from now on the sequence is like any other."""
    logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
    return None if logprobs is None else tuple(logprobs)


def _finish_reason(
    token_id: int, num_output_tokens: int, params: SamplingParams, stop_ids: frozenset[int], max_tokens: int
) -> FinishReason | None:
    """Why a choice ends with its latest token, if it does."""
    if token_id in stop_ids and num_output_tokens > params.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if num_output_tokens >= max_tokens else None
