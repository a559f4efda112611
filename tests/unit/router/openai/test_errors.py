"""The table of statuses, and what a client is told."""

import msgspec
import pytest

from services.core import errors
from services.router.openai.errors import reply_to


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "retry_after"),
    [
        (errors.InvalidRequest("n", "is wrong"), 400, "invalid_request_error", "invalid_value", None),
        (errors.UnknownModel("no such model"), 404, "invalid_request_error", "model_not_found", None),
        (errors.QueueFull("full", retry_after_s=0.1), 429, "rate_limit_error", "queue_full", "1"),
        (errors.Overloaded("late", retry_after_s=2.1), 429, "rate_limit_error", "overloaded", "3"),
        (errors.Overloaded("never", retry_after_s=float("inf")), 429, "rate_limit_error", "overloaded", "3600"),
        (errors.SlowReader("slow"), 429, "rate_limit_error", "slow_reader", None),
        (errors.Draining("draining"), 503, "service_unavailable_error", "draining", "1"),
        (errors.DeadlineExceeded("late"), 504, "timeout_error", "deadline_exceeded", None),
        (errors.Incompatible("other layout"), 500, "server_error", "incompatible", None),
    ],
)
def test_reply_when_an_error_is_of_the_tree_has_its_status_and_words(
    error: errors.BatonError, status: int, kind: str, code: str, retry_after: str | None
) -> None:
    reply = reply_to(error, "r1")
    told = msgspec.json.decode(reply.body)["error"]
    assert (reply.status, told["type"], told["code"]) == (status, kind, code)
    assert reply.headers.get("retry-after") == retry_after
    assert told["message"] == error.message
    assert told["param"] == ("n" if isinstance(error, errors.InvalidRequest) else None)


def test_reply_when_an_error_is_not_of_the_tree_tells_the_request_id_alone() -> None:
    reply = reply_to(ValueError("the password is x"), "r1")
    assert reply.status == 500
    assert msgspec.json.decode(reply.body)["error"]["message"] == "internal error, request r1"
