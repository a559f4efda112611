"""EngineCore when prompt and output are computed by two of them: the test copies the blocks from one pool to the other."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from services.core.errors import InvalidRequest
from services.core.types import FinishReason, PrefillTiming, SampledToken, SamplingParams, TokenEvent, TokenLogprobs
from services.engine.batch import StepBatch
from services.engine.core import EngineCore
from services.engine.events import Event, PrefillProgress, Reserved
from services.engine.sampler import SampleRow, ScoreRow
from services.engine.sequence import EngineRequest, Purpose
from services.engine.settings import EngineSettings

MakeCore = Callable[..., EngineCore]
CONTEXT_TOKENS, VOCAB_SIZE, EOS, BLOCK_BYTES = 256, 128, 2, 4096  # of the checkpoint in conftest.py
PROMPT = list(range(10, 50))  # two blocks and a half


def make_request(request_id: str = "r", prompt: Sequence[int] = PROMPT, **sampling: Any) -> EngineRequest:
    fields: dict[str, Any] = {"seed": 1, "ignore_eos": True, "max_tokens": 12, **sampling}
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(**fields))


def drain(core: EngineCore) -> list[Event]:
    """Everything that comes while the core has work; the pool's blocks add up after every step."""
    events: list[Event] = []
    for _ in range(1000):
        if not core.has_work:
            return events
        events += core.step()
        stats = core.stats()
        assert stats.blocks_free + stats.blocks_cached + stats.blocks_owned + stats.blocks_quarantined == stats.blocks_total
    raise AssertionError("steps that do nothing")


def token_events(events: Sequence[Event], choice: int = 0) -> list[TokenEvent]:
    return [event for event in events if isinstance(event, TokenEvent) and event.choice == choice]


def token_ids(events: Sequence[Event], choice: int = 0) -> list[int | None]:
    return [event.token_id for event in token_events(events, choice)]


def alone(core: EngineCore, request: EngineRequest) -> list[Event]:
    core.add(request)
    return drain(core)


def prefill(core: EngineCore, request: EngineRequest) -> list[PrefillProgress]:
    """All events of a prefill, whose blocks are held afterwards."""
    core.validate(request, Purpose.PREFILL)
    core.add(request, Purpose.PREFILL)
    events = []
    for event in drain(core):
        assert isinstance(event, PrefillProgress)
        events.append(event)
    return events


def reserve(core: EngineCore, request: EngineRequest) -> Reserved:
    core.add(request, Purpose.RECEIVE)
    (event,) = drain(core)
    assert isinstance(event, Reserved)
    return event


def copy_blocks(source: EngineCore, done: PrefillProgress, target: EngineCore, reserved: Reserved) -> None:
    """What a KV transport does."""
    assert source.layout_fingerprint == target.layout_fingerprint
    first = reserved.num_cached_tokens // target.block_size
    for from_id, to_id in zip(done.block_ids[first:], reserved.block_ids[first:], strict=True):
        target._runner.pools[0][to_id] = source._runner.pools[0][from_id]


def hand_over(source: EngineCore, target: EngineCore, request: EngineRequest) -> list[Event]:
    """A request through both; returns its events on the second one."""
    reserved = reserve(target, request)
    done = prefill(source, request)[-1]
    copy_blocks(source, done, target, reserved)
    source.abort(request.request_id)
    assert done.first_tokens is not None
    target.validate_first_tokens(request, done.first_tokens)
    told = target.first_events(request, done.first_tokens, cached_tokens=reserved.num_cached_tokens)
    events = target.landed(request.request_id, done.first_tokens)
    assert told == events  # the engine tells them before the core has made them
    return events + drain(target)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.2, "repetition_penalty": 1.3},
        {"logit_bias": {7: 100.0}, "min_tokens": 3, "stop_token_ids": (7,)},
        {"logit_bias": {EOS: 100.0}, "ignore_eos": False},
        {"max_tokens": 1},
        {"n": 3, "temperature": 1.5},
        {"n": 3, "logit_bias": {EOS: 100.0}, "ignore_eos": False},
    ],
)
@pytest.mark.parametrize("length", [1, 16, 31, 40])
def test_events_when_the_prompt_was_computed_elsewhere_are_those_of_one_engine(
    make_core: MakeCore, sampling: dict[str, Any], length: int
) -> None:
    request = make_request(prompt=PROMPT[:length], **sampling)
    expected = alone(make_core(), request)
    target = make_core(kv_memory_bytes=40 * BLOCK_BYTES)
    events = hand_over(make_core(), target, request)
    for choice in range(request.sampling.n):
        pairs = zip(token_events(events, choice), token_events(expected, choice), strict=True)
        for ours, theirs in pairs:
            assert (ours.token_id, ours.position, ours.logprobs, ours.finish_reason) == (
                theirs.token_id,
                theirs.position,
                theirs.logprobs,
                theirs.finish_reason,
            )
            assert ours.prefill is None  # it was not computed here
    stats = target.stats()
    assert (stats.blocks_owned, stats.num_reserved, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)
    assert stats.prefill_tokens < length or length == 1 or request.sampling.n > 1
    assert stats.blocks_cached >= length // 16  # what has landed may be shared from now on


def test_prefill_when_the_prompt_is_cut_into_chunks_tells_of_each_and_holds_all_blocks(make_core: MakeCore) -> None:
    core = make_core(prefill_chunk_tokens=16)
    events = prefill(core, make_request())
    assert [event.num_computed_tokens for event in events] == [14, 27, 40]
    assert len(events[0].block_ids) == 3
    assert {event.block_ids for event in events} == {events[0].block_ids}
    assert [event.first_tokens is None for event in events] == [True, True, False]
    assert [event.timing is None for event in events] == [True, True, False]
    stats = core.stats()
    assert (stats.num_held, stats.num_running, stats.blocks_owned) == (1, 0, 3)
    core.abort("r")
    stats = core.stats()
    assert (stats.num_held, stats.blocks_owned, stats.blocks_cached) == (0, 0, 2)


def test_prefill_when_a_part_is_cached_tells_of_it_before_anything_is_computed(make_core: MakeCore) -> None:
    core = make_core()
    prefill(core, make_request())
    core.abort("r")
    core.add(make_request(), Purpose.PREFILL)
    announced: list[Event] = []
    computed = core.stats().prefill_tokens

    def announce(events: list[Event]) -> None:
        assert core.stats().prefill_tokens == computed
        announced.extend(events)

    (done,) = core.step(announce)
    (cached,) = announced
    assert isinstance(cached, PrefillProgress)
    assert isinstance(done, PrefillProgress)
    assert (cached.num_computed_tokens, cached.cached_tokens, cached.first_tokens) == (32, 32, None)
    assert (done.num_computed_tokens, done.cached_tokens, done.block_ids) == (40, 32, cached.block_ids)
    assert done.first_tokens is not None


def test_prefill_when_there_are_choices_samples_all_their_first_tokens_from_one_prompt(make_core: MakeCore) -> None:
    request = make_request(n=4, temperature=3.0, logprobs=1)
    core = make_core()
    (done,) = prefill(core, request)
    assert core.stats().prefill_tokens == 40
    expected = alone(make_core(), request)
    firsts = [token_events(expected, choice)[0] for choice in range(4)]
    assert done.first_tokens == tuple(SampledToken(event.token_id or 0, event.logprobs) for event in firsts)
    assert len({token.token_id for token in done.first_tokens or ()}) > 1


def test_prefill_when_many_are_held_still_computes_more_than_max_num_seqs(make_core: MakeCore) -> None:
    core = make_core(max_num_seqs=2)
    for index in range(5):
        prefill(core, make_request(str(index), [index] * 20))
    stats = core.stats()
    assert (stats.num_held, stats.blocks_owned) == (5, 10)


def test_prefill_when_held_ones_leave_no_block_waits_without_work_until_one_is_released(make_core: MakeCore) -> None:
    core = make_core(kv_memory_bytes=4 * BLOCK_BYTES)
    prefill(core, make_request("a"))
    assert prefill(core, make_request("b", [1] * 40)) == []
    assert (core.has_work, core.stats().num_waiting) == (False, 1)
    core.abort("a")
    assert core.has_work
    assert len(drain(core)) == 1


def test_validate_when_a_prompt_is_only_computed_here_takes_any_that_leaves_one_token(make_core: MakeCore) -> None:
    core = make_core()
    longest = [1] * (CONTEXT_TOKENS - 1)
    core.validate(make_request(prompt=longest, max_tokens=200), Purpose.PREFILL)
    (done, *_) = reversed(prefill(core, make_request(prompt=longest, max_tokens=200)))
    assert done.num_computed_tokens == CONTEXT_TOKENS - 1
    with pytest.raises(InvalidRequest):
        core.validate(make_request(prompt=[*longest, 1]), Purpose.PREFILL)
    with pytest.raises(InvalidRequest):
        core.validate(make_request(prompt=longest, max_tokens=200), Purpose.RECEIVE)


def test_reserve_when_admitted_holds_blocks_and_place_and_leaves_no_work(make_core: MakeCore) -> None:
    core = make_core()
    alone(core, make_request("before", max_tokens=1))
    reserved = reserve(core, make_request())
    assert (len(reserved.block_ids), reserved.num_cached_tokens) == (3, 32)
    assert reserved.queue_s > 0
    stats = core.stats()
    assert (stats.num_reserved, stats.num_running, stats.num_waiting, stats.blocks_owned) == (1, 0, 0, 3)
    assert (stats.uncomputed_prompt_tokens, stats.steps) == (0, 1)
    assert not core.has_work


def test_landed_when_the_block_of_the_last_token_is_new_needs_no_other_block_of_a_cached_prompt(make_core: MakeCore) -> None:
    """Warm on the second engine: only the last block travels."""
    target, source = make_core(), make_core()
    expected = token_ids(alone(target, make_request()))
    reserved = reserve(target, make_request())
    done = prefill(source, make_request())[-1]
    assert done.first_tokens is not None
    target._runner.pools[0][reserved.block_ids[-1]] = source._runner.pools[0][done.block_ids[-1]]
    events = target.landed("r", done.first_tokens) + drain(target)
    assert token_ids(events) == expected
    assert {event.cached_tokens for event in token_events(events)} == {32}


@pytest.mark.parametrize(("num_landed", "num_computed"), [(0, 40), (15, 40), (16, 24), (39, 8), (40, 8)])
def test_compute_here_when_a_part_has_landed_computes_the_rest(make_core: MakeCore, num_landed: int, num_computed: int) -> None:
    request = make_request()
    expected = alone(make_core(), request)
    source, target = make_core(), make_core()
    reserved = reserve(target, request)
    done = prefill(source, request)[-1]
    for index in range(num_landed // 16):
        target._runner.pools[0][reserved.block_ids[index]] = source._runner.pools[0][done.block_ids[index]]
    target.compute_here("r", num_landed)
    events = drain(target)
    assert token_ids(events) == token_ids(expected)
    assert target.stats().prefill_tokens == num_computed
    assert token_events(events)[0].prefill is not None


def test_compute_here_when_all_of_a_prompt_of_whole_blocks_has_landed_computes_its_last_block(make_core: MakeCore) -> None:
    request = make_request(prompt=PROMPT[:32])
    source, target = make_core(), make_core()
    reserved = reserve(target, request)
    copy_blocks(source, prefill(source, request)[-1], target, reserved)
    target.compute_here("r", 32)
    assert token_ids(drain(target)) == token_ids(alone(make_core(), request))
    assert target.stats().prefill_tokens == 16


def test_compute_here_when_less_has_landed_than_was_cached_begins_after_the_cached_part(make_core: MakeCore) -> None:
    core = make_core()
    expected = token_ids(alone(core, make_request()))
    reserve(core, make_request())
    before = core.stats().prefill_tokens
    core.compute_here("r", 0)
    assert token_ids(drain(core)) == expected
    assert core.stats().prefill_tokens == before + 8


def test_quarantine_when_a_peer_writes_on_computes_the_prompt_in_other_blocks(make_core: MakeCore) -> None:
    request = make_request(n=2)
    expected = alone(make_core(), request)
    core = make_core(kv_memory_bytes=8 * BLOCK_BYTES)
    reserved = reserve(core, request)
    core.quarantine("r")
    stats = core.stats()
    assert (stats.num_reserved, stats.num_waiting, stats.blocks_owned, stats.blocks_quarantined) == (0, 1, 0, 3)
    assert stats.uncomputed_prompt_tokens == 40
    events: list[Event] = []
    while core.has_work:
        core._runner.pools[0][list(reserved.block_ids)] = float("nan")
        events += core.step()
    for choice in range(2):
        assert token_ids(events, choice) == token_ids(expected, choice)
    core.lift_quarantine(reserved.block_ids)
    stats = core.stats()
    assert (stats.blocks_quarantined, stats.blocks_free + stats.blocks_cached) == (0, 8)


def test_quarantine_when_no_room_is_left_waits_for_the_quarantine_to_be_lifted(make_core: MakeCore) -> None:
    core = make_core(kv_memory_bytes=4 * BLOCK_BYTES)
    reserved = reserve(core, make_request())
    core.quarantine("r")
    assert not core.has_work
    core.lift_quarantine(reserved.block_ids[:1])
    assert not core.has_work
    core.lift_quarantine(reserved.block_ids[1:])
    assert token_ids(drain(core)) == token_ids(alone(make_core(), make_request()))


def test_quarantine_when_the_request_is_given_up_keeps_nothing_of_it_but_the_blocks(make_core: MakeCore) -> None:
    core = make_core()
    reserved = reserve(core, make_request())
    core.quarantine("r")
    core.abort("r")
    stats = core.stats()
    assert (stats.num_reserved, stats.num_waiting, stats.blocks_quarantined) == (0, 0, 3)
    core.lift_quarantine(reserved.block_ids)
    assert core.pool.num_free == core.pool.num_blocks


def test_abort_when_a_request_is_reserved_frees_its_blocks(make_core: MakeCore) -> None:
    core = make_core()
    reserve(core, make_request())
    core.abort("r")
    stats = core.stats()
    assert (stats.num_reserved, stats.blocks_owned, stats.blocks_free) == (0, 0, 64)


@pytest.mark.parametrize(
    ("first_tokens", "limit"),
    [
        ([], 2),
        ([SampledToken(1, None)], 2),
        ([SampledToken(1, None)] * 3, 2),
        ([SampledToken(1, None), SampledToken(VOCAB_SIZE, None)], VOCAB_SIZE - 1),
        ([SampledToken(-1, None), SampledToken(1, None)], VOCAB_SIZE - 1),
    ],
)
def test_validate_first_tokens_when_a_peer_sends_what_cannot_be_raises(
    make_core: MakeCore, first_tokens: list[SampledToken], limit: int
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_core().validate_first_tokens(make_request(n=2), first_tokens)
    assert (caught.value.field, caught.value.limit) == ("first_tokens", limit)


class SteppedClock:
    """Tells the time that the test has set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def clocked_core(core: EngineCore, clock: SteppedClock, *, model_s: float) -> EngineCore:
    """Its model takes so long for every step; between the two limits at which chunks would change their size."""
    runner = core._runner
    execute = runner.execute

    def timed(
        batch: StepBatch, samples: Sequence[SampleRow], scores: Sequence[ScoreRow] = ()
    ) -> tuple[list[SampledToken], list[TokenLogprobs]]:
        before = runner.model_s
        sampled = execute(batch, samples, scores)
        runner.model_s = before + model_s
        clock.now += model_s
        return sampled

    runner.execute = timed  # type: ignore[method-assign]
    settings = EngineSettings(block_size=16, prefill_chunk_tokens=20)
    return EngineCore(runner, settings, model_fingerprint=b"m", eos_token_ids=(EOS,), max_model_len=CONTEXT_TOKENS, clock=clock)


def timings(events: Sequence[Event]) -> list[PrefillTiming]:
    return [event.prefill for event in events if isinstance(event, TokenEvent) and event.prefill]


def test_prefill_timing_when_a_prompt_is_computed_here_comes_once_with_its_first_token(make_core: MakeCore) -> None:
    clock = SteppedClock()
    core = clocked_core(make_core(), clock, model_s=0.25)
    core.add(make_request(n=3), arrived_at=97.0)
    clock.now = 101.0
    events = drain(core)
    assert timings(events) == [PrefillTiming(queue_s=4.0, prefill_s=0.5, model_s=0.5, sampled_at=101.5)]
    assert (timings(events)[0].began_at, timings(events)[0].queued_at) == (101.0, 97.0)
    assert token_events(events)[0].prefill


def test_prefill_timing_when_prompts_share_a_step_divides_the_model_s_time_by_their_tokens(make_core: MakeCore) -> None:
    clock = SteppedClock()
    core = clocked_core(make_core(), clock, model_s=0.25)
    core.add(make_request("a", [1] * 15, max_tokens=1))
    core.add(make_request("b", [2] * 10, max_tokens=1))  # five of its tokens in the first step, five alone in the second
    first, second = timings(drain(core))
    assert first == PrefillTiming(queue_s=0.0, prefill_s=0.25, model_s=0.25 * 15 / 20, sampled_at=100.25)
    assert second == PrefillTiming(queue_s=0.0, prefill_s=0.5, model_s=0.25 * 5 / 20 + 0.25, sampled_at=100.5)


def test_prefill_timing_when_a_prompt_waits_for_a_place_counts_that_as_queued(make_core: MakeCore) -> None:
    clock = SteppedClock()
    core = clocked_core(make_core(), clock, model_s=0.25)
    core.add(make_request("a", [1] * 20, max_tokens=1))
    core.add(make_request("b", [2] * 10, max_tokens=1))
    assert [timing.queue_s for timing in timings(drain(core))] == [0.0, 0.25]


def test_prefill_timing_when_a_prompt_is_computed_for_another_engine_comes_with_its_last_event(make_core: MakeCore) -> None:
    clock = SteppedClock()
    core = clocked_core(make_core(), clock, model_s=0.25)
    core.add(make_request(), Purpose.PREFILL, arrived_at=99.5)
    events = drain(core)
    assert [event.timing for event in events if isinstance(event, PrefillProgress)] == [
        None,
        PrefillTiming(queue_s=0.5, prefill_s=0.5, model_s=0.5, sampled_at=100.5),
    ]


@pytest.mark.parametrize("is_quarantined", [False, True])
def test_prefill_timing_when_a_reserved_prompt_is_computed_here_after_all_begins_there(make_core: MakeCore, is_quarantined: bool) -> None:
    clock = SteppedClock()
    core = clocked_core(make_core(), clock, model_s=0.25)
    core.add(make_request(), Purpose.RECEIVE, arrived_at=98.0)
    (reserved,) = drain(core)
    assert isinstance(reserved, Reserved)
    assert (reserved.queue_s, reserved.reserved_at) == (2.0, 100.0)
    clock.now += 10.0
    if is_quarantined:
        core.quarantine("r")
    else:
        core.compute_here("r")
    clock.now += 1.0
    assert timings(drain(core)) == [PrefillTiming(queue_s=1.0, prefill_s=0.5, model_s=0.5, sampled_at=111.5)]


def test_events_when_finished_at_the_landed_token_end_there(make_core: MakeCore) -> None:
    core = make_core()
    reserve(core, make_request(max_tokens=1, n=2))
    events = core.landed("r", [SampledToken(5, None), SampledToken(6, None)])
    assert [(event.choice, event.token_id, event.position, event.finish_reason) for event in events if isinstance(event, TokenEvent)] == [
        (0, 5, 40, FinishReason.LENGTH),
        (1, 6, 40, FinishReason.LENGTH),
    ]
    assert not core.has_work
    assert core.stats().blocks_owned == 0
