"""Delivery without an engine: which listener hears what, in how many calls, and until when."""

import asyncio
from collections.abc import Sequence

import pytest

from services.core.errors import EngineStopped
from services.core.types import FinishReason, SamplingParams, TokenEvent
from services.engine.delivery import Delivery, EventStream, abort_events
from services.engine.events import Event, Reserved
from services.engine.sequence import EngineRequest


def make_request(request_id: str, n: int = 1) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_token_ids=[1], sampling=SamplingParams(n=n))


def token(request_id: str, choice: int = 0, *, position: int = 1, end: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(
        request_id=request_id, choice=choice, token_id=5, position=position, logprobs=None, finish_reason=end, cached_tokens=0
    )


class Recorder:
    """A listener that keeps what it hears, call by call."""

    def __init__(self) -> None:
        self.calls: list[list[Event]] = []

    def hear(self, events: Sequence[Event]) -> None:
        self.calls.append(list(events))


def test_deliver_when_one_listener_has_many_requests_calls_it_once_with_all_events_in_order() -> None:
    delivery, ours, theirs = Delivery(), Recorder(), Recorder()
    for request_id in ("a", "b"):
        delivery.open(make_request(request_id), ours.hear)  # a new bound method each time, but an equal one
    delivery.open(make_request("c"), theirs.hear)
    events = [token("b"), token("c"), token("a"), token("b", position=2)]
    delivery.deliver(events)
    assert ours.calls == [[events[0], events[2], events[3]]]
    assert theirs.calls == [[events[1]]]


def test_deliver_when_all_choices_have_ended_forgets_the_request_of_a_listener() -> None:
    delivery, recorder = Delivery(), Recorder()
    delivery.open(make_request("a", n=2), recorder.hear)
    delivery.deliver([token("a", 1, end=FinishReason.STOP)])
    assert len(delivery) == 1
    delivery.deliver([token("a", 0, end=FinishReason.LENGTH)])
    assert (len(delivery), len(recorder.calls)) == (0, 2)
    delivery.deliver([token("a")])  # nobody is there to hear it
    assert len(recorder.calls) == 2


def test_deliver_when_a_request_was_closed_drops_its_events() -> None:
    delivery, recorder = Delivery(), Recorder()
    opened = delivery.open(make_request("a"), recorder.hear)
    assert delivery.close(opened)
    assert not delivery.close(opened)
    delivery.deliver([token("a")])
    assert recorder.calls == []


def test_close_when_the_id_has_been_given_to_another_request_leaves_that_one_alone() -> None:
    delivery, recorder = Delivery(), Recorder()
    first = delivery.open(make_request("a"), recorder.hear)
    delivery.close(first)
    second = delivery.open(make_request("a"), recorder.hear)
    assert not delivery.close(first)
    assert delivery.get("a") is second


def test_deliver_when_blocks_are_reserved_remembers_them_before_the_listener_hears_it() -> None:
    delivery = Delivery()
    seen: list[Reserved | None] = []
    opened = delivery.open(make_request("a"), lambda events: seen.append(opened.reserved))
    reserved = Reserved(request_id="a", block_ids=(1, 2), num_cached_tokens=16, queue_s=0.0, reserved_at=0.0)
    delivery.deliver([reserved])
    assert seen == [reserved]


def test_deliver_when_a_listener_fails_tells_the_log_and_the_others_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    delivery, recorder = Delivery(), Recorder()

    def fail(events: Sequence[Event]) -> None:
        raise ZeroDivisionError

    delivery.open(make_request("a"), fail)
    delivery.open(make_request("b"), recorder.hear)
    delivery.deliver([token("a"), token("b")])
    assert recorder.calls == [[token("b")]]
    assert "ZeroDivisionError" in caplog.text


def test_end_when_a_listener_has_many_requests_tells_it_once_and_forgets_them() -> None:
    delivery, recorder = Delivery(), Recorder()
    for request_id in ("a", "b"):
        delivery.open(make_request(request_id), recorder.hear)
    reason = EngineStopped("the engine is closed")
    delivery.end(reason)
    delivery.end(reason)
    assert recorder.calls == [[reason]]
    assert len(delivery) == 0


def test_abort_events_when_some_choices_have_ended_end_the_others() -> None:
    delivery, recorder = Delivery(), Recorder()
    opened = delivery.open(make_request("a", n=3), recorder.hear)
    delivery.deliver([token("a", 1, end=FinishReason.STOP)])
    events = abort_events(opened)
    assert [(event.choice, event.finish_reason) for event in events if isinstance(event, TokenEvent)] == [
        (0, FinishReason.ABORT),
        (2, FinishReason.ABORT),
    ]


def test_event_stream_when_read_gives_events_in_order_and_raises_at_the_engine_s_end() -> None:
    async def main() -> None:
        delivery = Delivery()
        opened = delivery.open(make_request("a"), None)
        assert isinstance(opened.stream, EventStream)
        delivery.deliver([token("a"), token("a", position=2, end=FinishReason.STOP)])
        assert len(delivery) == 1  # until somebody has read it
        delivery.end(EngineStopped("the engine failed"))
        assert [await opened.stream.next() for _ in range(2)] == [token("a"), token("a", position=2, end=FinishReason.STOP)]
        with pytest.raises(EngineStopped):
            await opened.stream.next()

    asyncio.run(main())
