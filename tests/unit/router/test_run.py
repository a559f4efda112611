"""A request over its attempts: what the next one starts, who may be tried, how long; and what a client has got meanwhile."""

import time
from collections.abc import Sequence
from typing import Any

import pytest

from protos.baton.v1 import decode_pb2
from services.core.errors import BatonError, Draining, EngineStopped, InvalidRequest, PeerUnavailable, QueueFull
from services.core.noise import choice_seed
from services.core.types import FinishReason, SamplingParams
from services.mesh import convert
from services.router.decode_session import Arrival
from services.router.request import GenerationRequest
from services.router.run import MAX_ATTEMPTS, MAX_ATTEMPTS_IN_ALL, Failures, Part, Run
from tests.unit.router.scripted_worker import IDENTITY

PROMPT = list(range(40))


class Words:
    """A tokenizer whose token i is the text "<i>"."""

    def detokenizer(self) -> "Words":
        return self

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(f"<{token_id}>" for token_id in token_ids)

    def finish(self) -> str:
        return ""


def make_run(*, stop: Sequence[str] = (), **sampling: Any) -> Run:
    tokenizer: Any = Words()
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(**{"max_tokens": 20, "seed": 7, **sampling}),
        stop=stop,
        received_at=time.perf_counter(),
        tokenize_s=0.0,
    )
    return Run(request, tokenizer, IDENTITY, router_id="router", recovery_s=10.0)


def tokens_of(part: Part) -> list[int]:
    return convert.unpack_u32(part.packed_tokens)


def test_parts_when_nothing_has_come_are_the_whole_request_at_once() -> None:
    run = make_run(n=3, prompt_logprobs=1)
    [part] = run.parts()
    assert (list(part.choices), part.sampling, tokens_of(part)) == ([0, 1, 2], run.sampling, PROMPT)
    assert run.next_positions() == [40, 40, 40]


def test_parts_when_tokens_have_come_go_on_with_each_open_choice_from_where_it_is() -> None:
    run = make_run(n=3, prompt_logprobs=1)
    for choice, token_ids, reason in ((0, (5, 6), None), (1, (8,), FinishReason.STOP), (2, (9,) * 9, None)):
        run.take(Arrival(choice, token_ids, (), reason))
    third, first = run.parts()  # the longest begins, and the others find its prompt in the cache
    assert (list(first.choices), tokens_of(first)) == ([0], [*PROMPT, 5, 6])
    assert (list(third.choices), tokens_of(third)) == ([2], [*PROMPT, *(9,) * 9])
    assert [part.sampling.seed for part in (first, third)] == [7, choice_seed(7, 2)]
    assert {(part.sampling.n, part.sampling.max_tokens, part.sampling.prompt_logprobs) for part in (first, third)} == {(1, 20, None)}
    assert run.next_positions() == [42, 41, 49]
    assert (run.num_open, run.num_tokens) == (2, 49)


def test_block_hashes_when_a_choice_has_grown_go_on_into_what_it_has() -> None:
    run = make_run()
    of_prompt = run.block_hashes()
    assert len(of_prompt) == 2
    run.take(Arrival(0, tuple(range(300, 310)), (), None))
    assert len(run.block_hashes()) == 3
    assert run.block_hashes()[:2] == of_prompt


def test_stop_string_when_it_lies_across_two_attempts_is_found_and_nothing_of_it_shown() -> None:
    run = make_run(stop=["<2><3>"])
    run.stages.token(decode_pb2.Prefilled())
    shown = run.take(Arrival(0, (1, 2), (), None))
    assert shown is not None and shown.text == "<1>"
    run.parts()
    ended = run.take(Arrival(0, (3, 4), (), None))
    assert ended is not None
    assert (ended.text, list(ended.token_ids), ended.finish_reason) == ("", [3], FinishReason.STOP)
    assert run.is_finished and run.completion_tokens == 3


def test_failures_when_nothing_comes_of_attempts_end_with_the_last_error() -> None:
    failures = Failures(10.0)
    for attempt in range(1, MAX_ATTEMPTS):
        failures.note(f"d{attempt}", PeerUnavailable(f"{attempt}"), num_tokens=0)
        assert failures.excluded == [f"d{number}" for number in range(1, attempt + 1)]
    with pytest.raises(PeerUnavailable, match="last"):
        failures.note("d9", PeerUnavailable("last"), num_tokens=0)


def test_failures_when_attempts_bring_tokens_go_on_but_not_for_ever() -> None:
    """A request on which workers die is not handed to them all day, even if each gives it a token."""
    failures = Failures(10.0)
    for attempt in range(1, MAX_ATTEMPTS_IN_ALL):
        failures.note("d0", EngineStopped("died"), num_tokens=attempt)
        assert failures.excluded == ["d0"]
    with pytest.raises(EngineStopped):
        failures.note("d0", EngineStopped("died"), num_tokens=MAX_ATTEMPTS_IN_ALL)


def nobody(failures: Failures) -> BatonError | None:
    try:
        failures.nobody_left(PeerUnavailable("no worker"))
    except BatonError as error:
        return error
    return None


def test_nobody_left_when_the_request_was_never_started_refuses_it_at_once() -> None:
    error = nobody(Failures(10.0))
    assert error is not None and error.message == "no worker"


def test_nobody_left_when_a_worker_was_lost_waits_for_it_to_come_back_and_then_says_what_it_said() -> None:
    for recovery_s, said in ((10.0, None), (-1.0, "lost")):  # counted from when nobody is left
        failures = Failures(recovery_s)
        failures.note("d0", PeerUnavailable("lost"), num_tokens=0)
        error = nobody(failures)
        assert (error and error.message) == said
        assert failures.excluded == ([] if said is None else ["d0"])


def test_nobody_left_when_all_queues_are_full_is_told_unless_the_request_has_begun() -> None:
    for num_tokens in (0, 5):
        failures = Failures(10.0)
        failures.note("d0", QueueFull("full"), num_tokens=num_tokens)
        assert isinstance(nobody(failures), QueueFull) == (num_tokens == 0)


@pytest.mark.parametrize("refusal", [QueueFull("full"), Draining("drains")])
def test_failures_when_workers_only_refuse_go_on_for_as_long_as_somebody_may_come_back(refusal: BatonError) -> None:
    failures = Failures(10.0)
    failures.note("d0", PeerUnavailable("lost"), num_tokens=5)
    for _ in range(2 * MAX_ATTEMPTS_IN_ALL):
        failures.note("d1", refusal, num_tokens=5)
        assert nobody(failures) is None


def test_nobody_left_when_a_worker_finds_the_request_invalid_says_so_at_once() -> None:
    failures = Failures(10.0)
    failures.note("small", InvalidRequest("max_tokens", "too many here"), num_tokens=5)
    assert failures.excluded == ["small"], "another one may be larger"
    assert isinstance(nobody(failures), InvalidRequest)


def test_take_when_a_worker_does_not_end_a_choice_takes_none_of_what_is_too_much() -> None:
    run = make_run(max_tokens=3)
    run.take(Arrival(0, (1, 2), (), None))
    with pytest.raises(PeerUnavailable, match="did not end a choice after 3 tokens"):
        run.take(Arrival(0, (3, 4), (), None))
    assert (run.completion_tokens, run.next_positions()) == (2, [42])
