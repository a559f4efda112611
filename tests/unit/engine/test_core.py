"""EngineCore with a real tiny model and no threads: requests in, events out, books balanced after every step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from kernels.reference import gumbel_noise
from services.core.errors import InvalidRequest
from services.core.noise import choice_seed
from services.core.prefix_hash import prefix_key
from services.core.types import FinishReason, SampledToken, SamplingParams, TokenEvent, TokenLogprobs
from services.engine.batch import StepBatch
from services.engine.core import EngineCore
from services.engine.model_runner import ModelRunner
from services.engine.pacing import LONG_STEP_S
from services.engine.sampler import SampleRow, ScoreRow
from services.engine.scheduler import SCORED_TOKENS
from services.engine.sequence import EngineRequest, Purpose
from services.engine.settings import EngineSettings

MakeCore = Callable[..., EngineCore]
Choices = dict[tuple[str, int], list[TokenEvent]]
VOCAB_SIZE, CONTEXT_TOKENS, EOS, BLOCK_BYTES = 128, 256, 2, 4096  # of the checkpoint in conftest.py
PROMPT = list(range(10, 30))


def make_request(
    request_id: str = "r", prompt: Sequence[int] = PROMPT, *, prefix_key: bytes | None = None, **sampling: Any
) -> EngineRequest:
    sampling.setdefault("seed", 1)
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(**sampling), prefix_key=prefix_key)


def step(core: EngineCore) -> list[TokenEvent]:
    """One step of requests that are computed here; the pool's blocks must add up after it."""
    events = [event for event in core.step() if isinstance(event, TokenEvent)]
    stats = core.stats()
    in_places = stats.blocks_free + stats.blocks_cached + stats.blocks_owned + stats.blocks_quarantined
    assert in_places == stats.blocks_total
    assert stats.num_running <= 8
    return events


def drain(core: EngineCore) -> Choices:
    """Events of everything queued, by request and choice; checks what holds for any stream of events."""
    choices: Choices = {}
    while core.has_work:
        for event in step(core):
            events = choices.setdefault((event.request_id, event.choice), [])
            assert event.token_id is not None
            assert event.position is not None
            assert not events or (events[-1].finish_reason is None and events[-1].position == event.position - 1)
            events.append(event)
    assert all(events[-1].finish_reason is not None for events in choices.values())
    assert core.stats().blocks_owned == 0
    return choices


def generate(core: EngineCore, *requests: EngineRequest) -> Choices:
    for request in requests:
        core.validate(request)
        core.add(request)
    return drain(core)


def tokens(events: Sequence[TokenEvent]) -> list[int | None]:
    return [event.token_id for event in events]


def generate_tokens(core: EngineCore, request: EngineRequest) -> list[int | None]:
    return tokens(generate(core, request)[request.request_id, 0])


def test_step_when_a_request_runs_alone_gives_its_tokens_in_order_to_the_end(make_core: MakeCore) -> None:
    events = generate(make_core(), make_request(max_tokens=12))["r", 0]
    assert [event.position for event in events] == list(range(20, 32))
    assert [event.finish_reason for event in events] == [None] * 11 + [FinishReason.LENGTH]
    assert {event.cached_tokens for event in events} == {0}
    assert {event.logprobs for event in events} == {None}


@pytest.mark.parametrize("prompt_length", [1, 15, 16, 17, 63])
def test_step_when_max_tokens_is_not_given_goes_on_to_the_end_of_the_context(make_core: MakeCore, prompt_length: int) -> None:
    core = make_core(max_model_len=64)
    events = generate(core, make_request(prompt=[5] * prompt_length, ignore_eos=True))["r", 0]
    assert len(events) == 64 - prompt_length
    assert events[-1].position == 63
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_max_model_len_when_the_pool_is_smaller_than_the_context_is_what_the_pool_holds(make_core: MakeCore) -> None:
    core = make_core(kv_memory_bytes=3 * BLOCK_BYTES)
    assert (core.max_model_len, core.pool.num_blocks) == (48, 3)
    assert len(generate(core, make_request(ignore_eos=True))["r", 0]) == 28


@pytest.mark.parametrize(
    ("sampling", "expected", "reason"),
    [
        ({"logit_bias": {EOS: 100.0}}, [EOS], FinishReason.STOP),
        ({"logit_bias": {EOS: 100.0}, "ignore_eos": True}, [EOS] * 5, FinishReason.LENGTH),
        ({"logit_bias": {EOS: 100.0, 7: 50.0}, "min_tokens": 3}, [7, 7, 7, EOS], FinishReason.STOP),
        ({"logit_bias": {EOS: 100.0, 7: 50.0}, "min_tokens": 5}, [7] * 5, FinishReason.LENGTH),
        ({"logit_bias": {EOS: 100.0, 7: 50.0}, "min_tokens": 3, "ignore_eos": True}, [EOS] * 5, FinishReason.LENGTH),
        ({"logit_bias": {9: 100.0}, "stop_token_ids": (8, 9)}, [9], FinishReason.STOP),
        ({"logit_bias": {9: 100.0}, "stop_token_ids": (8, 9), "ignore_eos": True}, [9], FinishReason.STOP),
        ({"logit_bias": {9: 100.0}, "stop_token_ids": (8,)}, [9] * 5, FinishReason.LENGTH),
        ({"logit_bias": {9: 100.0, EOS: 90.0, 7: 50.0}, "stop_token_ids": (9,), "min_tokens": 1}, [7, 9], FinishReason.STOP),
        ({"logit_bias": {EOS: 100.0}, "max_tokens": 1}, [EOS], FinishReason.STOP),
        ({"logit_bias": {7: 100.0}, "max_tokens": 1}, [7], FinishReason.LENGTH),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_step_when_a_token_may_stop_the_sequence_ends_it_as_the_parameters_say(
    make_core: MakeCore, sampling: dict[str, Any], expected: list[int], reason: FinishReason, temperature: float
) -> None:
    events = generate(make_core(), make_request(**{"max_tokens": 5, "temperature": temperature, **sampling}))["r", 0]
    assert tokens(events) == expected
    assert events[-1].finish_reason is reason


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_step_when_the_seed_is_the_same_gives_the_same_tokens_whatever_happens_around_it(make_core: MakeCore, temperature: float) -> None:
    """Held to identity: at these fixed seeds no two best tokens come within fp32 rounding of one another."""
    request = make_request(prompt=PROMPT * 3, max_tokens=40, temperature=temperature, ignore_eos=True)
    core = make_core()
    alone = generate_tokens(core, request)
    assert core.stats().cached_tokens == 0
    assert generate_tokens(core, request) == alone  # its own blocks are cached now
    assert core.stats().cached_tokens > 0
    neighbours = [make_request(str(n), [n + 1] * (7 * n + 1), seed=n, max_tokens=20 + n) for n in range(6)]
    for settings in (
        {"prefill_chunk_tokens": 7},
        {"block_size": 32},
        {"max_num_seqs": 2},
        {"kv_memory_bytes": 9 * BLOCK_BYTES},
        {"kv_memory_bytes": 9 * BLOCK_BYTES, "prefill_chunk_tokens": 20},
    ):
        core = make_core(**settings)
        together = generate(core, *neighbours[:3], request, *neighbours[3:])
        assert tokens(together["r", 0]) == alone
        assert (core.stats().preemptions > 0) == ("kv_memory_bytes" in settings)


def test_step_when_the_distribution_is_almost_flat_takes_the_token_with_the_largest_noise_at_its_position(make_core: MakeCore) -> None:
    """Which noise belongs to which token is part of the contract: a draft and another worker must meet the same."""
    events = generate(make_core(), make_request(seed=2**40 + 3, temperature=100.0, max_tokens=60, ignore_eos=True))["r", 0]
    positions = [event.position for event in events if event.position is not None]
    best = gumbel_noise([2**40 + 3] * 60, positions, VOCAB_SIZE).topk(2, dim=-1)
    clear = (best.values[:, 0] - best.values[:, 1] > 0.2).tolist()  # logits / 100 move nothing that far
    expected = [token_id for token_id, is_clear in zip(best.indices[:, 0].tolist(), clear, strict=True) if is_clear]
    assert len(expected) > 40
    assert [event.token_id for event, is_clear in zip(events, clear, strict=True) if is_clear] == expected


def test_step_when_seeds_differ_or_are_not_given_gives_different_tokens(make_core: MakeCore) -> None:
    core = make_core()
    sampling: dict[str, Any] = {"max_tokens": 20, "temperature": 2.0, "ignore_eos": True}
    runs = [generate_tokens(core, make_request(seed=seed, **sampling)) for seed in (1, 2, None, None)]
    assert len({tuple(run) for run in runs}) == 4  # false alarm: 20 equal draws of an almost flat softmax, below 1e-20


def test_choices_when_a_request_has_several_equal_requests_with_the_seeds_of_the_choices(make_core: MakeCore) -> None:
    core = make_core()
    sampling: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
    choices = generate(core, make_request(n=4, seed=11, **sampling))
    assert set(choices) == {("r", choice) for choice in range(4)}
    for choice in range(4):
        single = generate_tokens(make_core(), make_request(seed=choice_seed(11, choice), **sampling))
        assert tokens(choices["r", choice]) == single


@pytest.mark.parametrize("settings", [{}, {"max_num_seqs": 1}, {"kv_memory_bytes": 4 * BLOCK_BYTES}, {"prefill_chunk_tokens": 3}])
def test_choices_when_there_is_little_room_all_end_and_compute_the_prompt_once(make_core: MakeCore, settings: dict[str, Any]) -> None:
    core = make_core(**settings)
    choices = generate(core, make_request(prompt=[9] * 33, n=5, max_tokens=10, ignore_eos=True))
    assert [len(choices["r", choice]) for choice in range(5)] == [10] * 5
    if not settings:
        assert core.stats().prefill_tokens == 33 + 4 * 2  # the others find 32 tokens cached; their 33rd and first own token are new
        assert core.stats().partial_prefills == 0


@pytest.mark.parametrize("n", [2, 5])
def test_choices_when_the_first_token_ends_them_all_end_in_one_step(make_core: MakeCore, n: int) -> None:
    core = make_core()
    core.add(make_request(n=n, logit_bias={EOS: 100.0}))
    events = step(core)
    assert [(event.choice, event.finish_reason) for event in events] == [(choice, FinishReason.STOP) for choice in range(n)]
    assert not core.has_work
    assert core.stats().blocks_owned == 0


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 8])
def test_abort_at_any_point_frees_the_blocks_at_once_and_leaves_the_others_alone(make_core: MakeCore, num_steps: int) -> None:
    other = make_request("other", [3] * 30, max_tokens=12, ignore_eos=True)
    alone = generate_tokens(make_core(), other)
    core = make_core(prefill_chunk_tokens=16)
    core.add(make_request(n=3, prompt=PROMPT * 2, max_tokens=50, ignore_eos=True))
    core.add(other)
    events = [event for _ in range(num_steps) for event in step(core)]
    core.abort("r")
    stats = core.stats()
    assert stats.num_running + stats.num_waiting == 1
    core.abort("r")  # again: ignored
    rest = drain(core)
    assert {request_id for request_id, _ in rest} == {"other"}
    assert [event.token_id for event in events if event.request_id == "other"] + tokens(rest["other", 0]) == alone


def test_abort_when_it_was_the_only_request_leaves_no_work_and_no_owned_block(make_core: MakeCore) -> None:
    core = make_core()
    core.add(make_request(max_tokens=50, ignore_eos=True))
    for _ in range(4):
        step(core)
    assert core.stats().blocks_owned == 2
    core.abort("r")
    core.abort("no such request")
    assert not core.has_work
    assert core.stats().blocks_owned == 0


@pytest.mark.parametrize(
    ("fields", "field", "limit"),
    [
        ({"prompt": []}, "prompt", 1),
        ({"prompt": [1] * CONTEXT_TOKENS}, "prompt", CONTEXT_TOKENS - 1),
        ({"prompt": [1] * 10_000}, "prompt", CONTEXT_TOKENS - 1),
        ({"prompt": [1, -1, 2]}, "prompt", VOCAB_SIZE - 1),
        ({"prompt": [1, VOCAB_SIZE, 2]}, "prompt", VOCAB_SIZE - 1),
        ({"temperature": float("nan")}, "temperature", "[0.0, 100.0]"),
        ({"stop_token_ids": (VOCAB_SIZE,)}, "stop_token_ids", VOCAB_SIZE - 1),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias", VOCAB_SIZE - 1),
        ({"prefix_key": b"short"}, "prefix_key", 32),
        ({"max_tokens": 0}, "max_tokens", "[1, ∞)"),
        ({"max_tokens": CONTEXT_TOKENS - 19}, "max_tokens", CONTEXT_TOKENS - 20),
    ],
)
def test_validate_when_a_request_can_never_be_served_raises_with_field_and_limit(
    make_core: MakeCore, fields: dict[str, Any], field: str, limit: object
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_core().validate(make_request(**fields))
    assert (caught.value.field, caught.value.limit) == (field, limit)


def test_validate_when_a_request_just_fits_accepts_it(make_core: MakeCore) -> None:
    core = make_core()
    for prompt_length in (1, 20, CONTEXT_TOKENS - 1):
        core.validate(make_request(prompt=[VOCAB_SIZE - 1] * prompt_length, max_tokens=CONTEXT_TOKENS - prompt_length))


def test_cached_tokens_when_a_prompt_was_seen_before_tells_how_many_were_found(make_core: MakeCore) -> None:
    core = make_core()
    prompt = [4] * 40
    first, second = (generate(core, make_request(prompt=prompt, max_tokens=3, n=2)) for _ in range(2))
    assert {event.cached_tokens for events in first.values() for event in events} == {0}
    assert {event.cached_tokens for events in second.values() for event in events} == {32}
    key = prefix_key(model_fingerprint=b"m", salt=b"another tenant")
    stranger = generate(core, make_request(prompt=prompt, max_tokens=3, prefix_key=key))
    assert stranger["r", 0][0].cached_tokens == 0
    assert generate(core, make_request(prompt=prompt, max_tokens=3, prefix_key=key))["r", 0][0].cached_tokens == 32


def test_logprobs_when_asked_for_come_with_each_token(make_core: MakeCore) -> None:
    for event in generate(make_core(), make_request(max_tokens=4, temperature=0.0, logprobs=3))["r", 0]:
        assert event.logprobs is not None
        assert len(event.logprobs.top) == 3
        assert event.logprobs.top[0] == (event.token_id, event.logprobs.chosen)  # greedy: the best of the raw logits


def test_stats_when_requests_have_run_account_for_every_token(make_core: MakeCore) -> None:
    core = make_core(prefill_chunk_tokens=16)
    generate(core, make_request("a", [1] * 40, max_tokens=6, ignore_eos=True))
    generate(core, make_request("b", [1] * 40, max_tokens=6, ignore_eos=True))
    stats = core.stats()
    assert (stats.prefill_tokens, stats.cached_tokens) == (40 + 8, 32)
    assert stats.decode_tokens == 2 * 5
    assert stats.partial_prefills == 2
    assert stats.steps == (3 + 5) + (1 + 5)
    assert (stats.num_running, stats.num_waiting, stats.largest_batch, stats.preemptions) == (0, 0, 1, 0)
    assert stats.step_s > stats.model_s > 0


class FakeClock:
    """Tells a time that moves by `step_s` with every look: a step looks at its start and at its end."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self._now = 0.0

    def __call__(self) -> float:
        self._now += self.step_s
        return self._now


def clocked_core(core: EngineCore, clock: FakeClock, *, prefill_chunk_tokens: int) -> EngineCore:
    settings = EngineSettings(block_size=16, prefill_chunk_tokens=prefill_chunk_tokens)
    return EngineCore(core._runner, settings, model_fingerprint=b"m", eos_token_ids=(EOS,), max_model_len=CONTEXT_TOKENS, clock=clock)


def run_steps(core: EngineCore, clock: FakeClock, step_s: float, num_steps: int) -> list[int]:
    """The chunk size after each of so many steps that each compute a piece of a prompt in `step_s`."""
    sizes = []
    for index in range(num_steps):
        core.add(make_request(f"{core.stats().steps} {index}", [1 + index] * 200, max_tokens=1))
        clock.step_s = step_s
        step(core)
        sizes.append(core.scheduler.prefill_chunk_tokens)
        core.abort(f"{core.stats().steps - 1} {index}")
        core.pool.clear_cache()
    return sizes


def test_prefill_chunk_when_steps_are_long_halves_to_a_block_and_grows_back_when_they_are_short(make_core: MakeCore) -> None:
    clock = FakeClock()
    core = clocked_core(make_core(), clock, prefill_chunk_tokens=120)
    assert run_steps(core, clock, LONG_STEP_S * 1.1, 5) == [60, 30, 16, 16, 16]
    assert run_steps(core, clock, LONG_STEP_S * 0.9, 2) == [16, 16]
    assert run_steps(core, clock, LONG_STEP_S / 4 * 0.9, 5) == [32, 64, 120, 120, 120]


def test_prefill_chunk_when_it_is_set_below_a_block_never_changes(make_core: MakeCore) -> None:
    clock = FakeClock()
    core = clocked_core(make_core(), clock, prefill_chunk_tokens=10)
    assert run_steps(core, clock, LONG_STEP_S * 2, 2) == [10, 10]
    assert run_steps(core, clock, 0.0, 2) == [10, 10]


def test_prefill_chunk_when_steps_only_decode_does_not_change(make_core: MakeCore) -> None:
    clock = FakeClock()
    core = clocked_core(make_core(), clock, prefill_chunk_tokens=120)
    core.add(make_request(max_tokens=4, ignore_eos=True))
    step(core)
    clock.step_s = LONG_STEP_S * 3
    for _ in range(3):
        step(core)
    assert core.scheduler.prefill_chunk_tokens == 120


@pytest.mark.parametrize(
    ("step_s", "expected"),
    [(0.0, 120), (LONG_STEP_S / 4, 64), (LONG_STEP_S / 2, 32), (LONG_STEP_S, 16), (LONG_STEP_S * 10, 16)],
)
def test_calibrate_when_a_block_takes_so_long_begins_with_what_half_a_second_affords(
    make_core: MakeCore, step_s: float, expected: int
) -> None:
    clock = FakeClock()
    core = clocked_core(make_core(), clock, prefill_chunk_tokens=120)
    clock.step_s = step_s
    core.calibrate()
    assert core.scheduler.prefill_chunk_tokens == expected
    assert core.pool.num_free == core.pool.num_blocks


@pytest.mark.parametrize("eos_token_id", [VOCAB_SIZE, -1])
def test_step_when_the_checkpoint_s_end_token_is_outside_the_vocabulary_still_holds_back_only_end_tokens(
    make_core: MakeCore, eos_token_id: int
) -> None:
    core = EngineCore(
        make_core()._runner,
        EngineSettings(block_size=16),
        model_fingerprint=b"m",
        eos_token_ids=(eos_token_id,),
        max_model_len=CONTEXT_TOKENS,
    )
    request = make_request(max_tokens=2, min_tokens=1, logit_bias={VOCAB_SIZE - 1: 100.0})
    assert generate_tokens(core, request) == [VOCAB_SIZE - 1] * 2


def test_calibrate_computes_prompts_of_every_kind_and_logits_so_that_no_request_waits_for_the_compiler(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core()
    batches: list[StepBatch] = []
    monkeypatch.setattr(core._runner, "execute", lambda batch, rows: batches.append(batch))
    core.calibrate()
    assert [batch.query_lens for batch in batches] == [[1], [16], [16]]
    monkeypatch.setattr(ModelRunner, "trial_lengths", (1, 8, 17))
    batches.clear()
    core.calibrate()
    assert [batch.query_lens for batch in batches] == [[1], [8], [17], [16], [16]]
    for batch in batches:
        [group] = batch.groups
        assert batch.logit_rows.tolist() == [len(batch.token_ids) - 1]
        assert len(group.block_tables[0]) * 16 >= group.context_lens[0] > int(batch.positions[-1])


def prompt_logprobs(core: EngineCore, request: EngineRequest) -> tuple[TokenLogprobs, ...]:
    """Those that came with the first token, and with no other."""
    events = generate(core, request)[request.request_id, 0]
    assert events[0].prompt_logprobs is not None
    assert all(event.prompt_logprobs is None for event in events[1:])
    return events[0].prompt_logprobs


@pytest.mark.parametrize("chunk_tokens", [16, 32, 512])
def test_prompt_logprobs_when_the_prompt_was_generated_equal_those_of_its_generation(make_core: MakeCore, chunk_tokens: int) -> None:
    core = make_core(prefill_chunk_tokens=chunk_tokens)
    generated = generate(core, make_request(max_tokens=50, temperature=0.0, ignore_eos=True, logprobs=3))["r", 0]
    prompt = [*PROMPT, *[event.token_id for event in generated if event.token_id is not None]]
    before = core.stats().cached_tokens
    logprobs = prompt_logprobs(core, make_request("scored", prompt, max_tokens=3, prompt_logprobs=3, ignore_eos=True))
    assert core.stats().cached_tokens == before, "the whole prompt was computed, though it was cached"
    assert len(logprobs) == len(prompt) - 1
    for scored, event in zip(logprobs[len(PROMPT) - 1 :], generated, strict=True):
        assert event.logprobs is not None
        assert scored.chosen == pytest.approx(event.logprobs.chosen, abs=1e-5)
        assert [token_id for token_id, _ in scored.top] == [token_id for token_id, _ in event.logprobs.top]


def test_prompt_logprobs_when_preempted_in_the_prompt_or_beside_others_are_the_same(make_core: MakeCore) -> None:
    prompt = [3 + index * 7 % 100 for index in range(70)]
    alone = prompt_logprobs(make_core(), make_request("r", prompt, max_tokens=2, prompt_logprobs=0, ignore_eos=True))
    assert all(entry.top == () for entry in alone)
    # Blocks for 96 tokens in all: the older request grows to 65 and takes those of the younger one, which is in its prompt.
    core = make_core(kv_memory_bytes=6 * BLOCK_BYTES, max_model_len=96, prefill_chunk_tokens=16)
    core.add(make_request("older", [9] * 15, max_tokens=50, ignore_eos=True))
    core.add(make_request("r", prompt, max_tokens=2, prompt_logprobs=0, ignore_eos=True))
    events = drain(core)["r", 0]
    assert events[0].prompt_logprobs is not None
    for one, other in zip(events[0].prompt_logprobs, alone, strict=True):
        assert one.chosen == pytest.approx(other.chosen, abs=1e-5)
    assert core.stats().preemptions > 0


def test_prompt_logprobs_when_there_are_choices_come_with_the_first_one_only(make_core: MakeCore) -> None:
    choices = generate(make_core(), make_request(n=3, max_tokens=3, prompt_logprobs=1, ignore_eos=True))
    assert [events[0].prompt_logprobs is not None for events in choices.values()] == [True, False, False]


@pytest.mark.parametrize("purpose", [Purpose.PREFILL, Purpose.RECEIVE])
def test_prompt_logprobs_when_another_engine_generates_are_refused(make_core: MakeCore, purpose: Purpose) -> None:
    with pytest.raises(InvalidRequest, match="prompt_logprobs"):
        make_core().validate(make_request(prompt_logprobs=0), purpose)


@pytest.mark.parametrize(
    ("output", "sampling", "field"),
    [
        ([5], {"n": 2}, "n"),
        ([5], {"prompt_logprobs": 0}, "prompt_logprobs"),
        ([VOCAB_SIZE], {}, "output_token_ids"),
        ([-1], {}, "output_token_ids"),
        ([5] * 4, {"max_tokens": 4}, "output_token_ids"),
        ([5] * (CONTEXT_TOKENS - len(PROMPT)), {}, "prompt"),
    ],
)
def test_validate_when_nothing_can_follow_what_another_engine_made_refuses(
    make_core: MakeCore, output: list[int], sampling: dict[str, Any], field: str
) -> None:
    core = make_core()
    with pytest.raises(InvalidRequest) as caught:
        core.validate(replace(make_request(**sampling), output_token_ids=output))
    assert caught.value.field == field
    core.validate(replace(make_request(max_tokens=5), output_token_ids=[5] * 4))


def test_prompt_logprobs_of_several_prompts_share_what_a_step_may_score(make_core: MakeCore) -> None:
    core = make_core(prefill_chunk_tokens=512, max_model_len=256, kv_memory_bytes=64 * BLOCK_BYTES)
    rows: list[int] = []
    execute = core._runner.execute

    def counting(batch: StepBatch, samples: Sequence[SampleRow], scores: Sequence[ScoreRow] = ()) -> Any:
        rows.append(len(scores))
        return execute(batch, samples, scores)

    core._runner.execute = counting  # type: ignore[method-assign]
    requests = [make_request(name, [7 + number] * 100, max_tokens=2, prompt_logprobs=0) for number, name in enumerate("abc")]
    choices = generate(core, *requests)
    assert all(len(choices[name, 0][0].prompt_logprobs or ()) == 99 for name in "abc")
    assert sum(rows) == 3 * 99 and max(rows) <= SCORED_TOKENS


def test_backlog_when_a_request_goes_on_from_received_tokens_counts_all_that_is_to_be_computed(make_core: MakeCore) -> None:
    core = make_core()
    core.add(replace(make_request(max_tokens=9), output_token_ids=[5, 6]))
    assert core.stats().uncomputed_prompt_tokens == len(PROMPT) + 2
    core.step()
    assert core.stats().uncomputed_prompt_tokens == 0


@pytest.mark.parametrize(("max_tokens", "reason"), [(3, FinishReason.LENGTH), (4, None)])
def test_first_events_when_a_request_goes_on_count_what_it_has(make_core: MakeCore, max_tokens: int, reason: FinishReason | None) -> None:
    request = replace(make_request(max_tokens=max_tokens), output_token_ids=[5, 6])
    [event] = make_core().first_events(request, [SampledToken(7, None)], cached_tokens=0)
    assert isinstance(event, TokenEvent)
    assert (event.position, event.finish_reason) == (len(PROMPT) + 2, reason)
