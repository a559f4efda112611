"""Baton's errors as OpenAI's clients expect them: a status, headers, and {"error": {message, type, param, code}}. One table, in one place.

The facts are those of mesh/status.py, which also writes the log: what is not of the tree tells nobody anything but the request id.
"""

import math

import msgspec
from starlette.exceptions import HTTPException

from services.core import errors
from services.mesh import status

# Status and type; what holds for a class holds for its subclasses that are not named.
STATUSES: dict[type[errors.BatonError], tuple[int, str]] = {
    errors.InvalidRequest: (400, "invalid_request_error"),
    errors.UnknownRequest: (404, "invalid_request_error"),
    errors.UnknownModel: (404, "invalid_request_error"),
    errors.ResourceExhausted: (429, "rate_limit_error"),
    errors.SlowReader: (429, "rate_limit_error"),
    errors.Unavailable: (503, "service_unavailable_error"),
    errors.TransferFenced: (503, "service_unavailable_error"),
    errors.ChecksumMismatch: (503, "service_unavailable_error"),
    errors.DeadlineExceeded: (504, "timeout_error"),
    errors.BatonError: (500, "server_error"),
}
# In OpenAI's own words where it has some, else Baton's reason.
_CODES = {errors.UnknownModel.reason: "model_not_found", errors.InvalidRequest.reason: "invalid_value"}


class ErrorReply(msgspec.Struct, frozen=True):
    """What a client is told; `retry_after_s` in whole seconds, None where no other try helps."""

    status: int
    body: bytes
    retry_after_s: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        return headers if self.retry_after_s is None else {**headers, "retry-after": str(self.retry_after_s)}


def reply_to(error: BaseException, request_id: str) -> ErrorReply:
    """Of any error; logs what is not of the tree."""
    if isinstance(error, HTTPException):
        return http_reply(error.status_code, error.detail)
    facts = status.to_proto(error, request_id)
    code, kind = next(STATUSES[known] for known in (*type(error).__mro__, errors.BatonError) if known in STATUSES)
    retry_after_s = None
    if isinstance(error, (errors.ResourceExhausted, errors.Unavailable)):
        retry_after_s = max(1, math.ceil(facts.retry_after_s))
    return ErrorReply(
        code,
        _body(facts.message, kind, facts.metadata.get("field"), _CODES.get(facts.reason, facts.reason.lower())),
        retry_after_s,
    )


def http_reply(code: int, message: str, *, retry_after_s: int | None = None) -> ErrorReply:
    """What is wrong about the HTTP, not about what it carries."""
    kind = "invalid_request_error" if code < 500 else "service_unavailable_error"
    return ErrorReply(code, _body(message, kind, None, None), retry_after_s)


def _body(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})
