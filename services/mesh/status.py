"""Baton's errors as gRPC statuses and back: one table, in one place.

A status carries google.rpc.ErrorInfo (reason, domain, metadata with field and limit) for machines, RetryInfo where another try may help,
and the message for people. What is not of the tree becomes INTERNAL and tells nobody anything but the request id; the log has the rest.
The same facts travel as baton.v1.Error inside streams that go on for other requests.
"""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos.baton.v1 import common_pb2
from services.core import errors

DOMAIN = "baton"
# A status travels in HTTP/2 headers, of which many clients take 8 KiB: the message once percent-encoded (up to three bytes for one) and,
# with the metadata, once more in base64. A status with more is lost, code and all.
MAX_MESSAGE_BYTES = 1500
MAX_METADATA_BYTES = 200
MAX_RETRY_AFTER_S = 3600.0
_RETRYABLE = (errors.ResourceExhausted, errors.Unavailable)

# The code of a class holds for its subclasses that are not named.
CODES: dict[type[errors.BatonError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ConfigurationError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownRequest: grpc.StatusCode.NOT_FOUND,
    errors.UnknownModel: grpc.StatusCode.NOT_FOUND,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.SlowReader: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Incompatible: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CheckpointError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TransferFenced: grpc.StatusCode.ABORTED,
    errors.ChecksumMismatch: grpc.StatusCode.DATA_LOSS,
}

_log = logging.getLogger(__name__)


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status code of an error; INTERNAL for whatever is not of the tree."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), grpc.StatusCode.INTERNAL)


def to_proto(error: BaseException, request_id: str) -> common_pb2.Error:
    """The error as it travels inside a stream, its texts cut to what headers can carry; logs what is not of the tree."""
    code: int = code_of(error).value[0]
    if not isinstance(error, errors.BatonError) or type(error) is errors.BatonError:
        _log.error("internal error", exc_info=error, extra={"request_id": request_id})
        return common_pb2.Error(code=code, message=f"internal error, request {request_id}", reason=errors.BatonError.reason)
    message = common_pb2.Error(code=code, message=_cut(error.message, MAX_MESSAGE_BYTES), reason=error.reason)
    if isinstance(error, errors.InvalidRequest):
        message.metadata["field"] = _cut(error.field, MAX_METADATA_BYTES)
        if error.limit is not None:
            message.metadata["limit"] = _cut(str(error.limit), MAX_METADATA_BYTES)
    if isinstance(error, _RETRYABLE):
        # Predicted delays may be infinite, which no Duration can say.
        message.retry_after_s = min(MAX_RETRY_AFTER_S, max(0.0, error.retry_after_s))
    return message


def from_proto(message: common_pb2.Error) -> errors.BatonError:
    """The error that to_proto was given, as far as its class can be told from its reason, else one of the same code."""
    kind = _KINDS.get(message.reason) or _BY_CODE.get(message.code, errors.BatonError)
    if kind is errors.InvalidRequest:
        return _invalid_request(message)
    if issubclass(kind, _RETRYABLE):
        return kind(message.message, retry_after_s=message.retry_after_s)
    return kind(message.message)


def to_status(error: BaseException, request_id: str) -> Any:
    """The rich status (grpc.Status) with which a call ends."""
    message = to_proto(error, request_id)
    status = status_pb2.Status(code=message.code, message=message.message)
    _pack(status, error_details_pb2.ErrorInfo(reason=message.reason, domain=DOMAIN, metadata=dict(message.metadata)))
    if message.retry_after_s:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(message.retry_after_s * 1e9))
        _pack(status, retry)
    return rpc_status.to_status(status)


def from_rpc_error(error: grpc.aio.AioRpcError | grpc.Call, peer: str) -> errors.BatonError:
    """The error with which a call to `peer` ended, as one of the tree. Statuses that Baton did not make are told from their code.

    A peer that dies can send no retry delay: its end is PeerUnavailable with the delay of that class.
    """
    message = common_pb2.Error(code=error.code().value[0], message=error.details() or "")
    # Details that cannot be read are not Baton's; the code says enough.
    with contextlib.suppress(DecodeError):
        for detail in _details(error):
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == DOMAIN:
                message.reason = info.reason
                message.metadata.update(info.metadata)
            elif detail.Unpack(retry):
                message.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    if message.reason:
        return from_proto(message)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(f"{peer} did not answer in time")
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return errors.InvalidRequest("request", message.message)
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.ResourceExhausted(f"{peer}: {message.message}")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return errors.Incompatible(f"{peer} does not know this call: it speaks another version of the protocol")
    return errors.PeerUnavailable(f"{peer}: {error.code().name.lower().replace('_', ' ')}: {message.message}")


def _details(error: grpc.aio.AioRpcError | grpc.Call) -> Sequence[AnyMessage]:
    for name, value in error.trailing_metadata():
        if name == "grpc-status-details-bin" and isinstance(value, bytes):
            details: Sequence[AnyMessage] = status_pb2.Status.FromString(value).details
            return details
    return ()


def _invalid_request(message: common_pb2.Error) -> errors.InvalidRequest:
    field = message.metadata.get("field", "request")
    return errors.InvalidRequest(field, message.message.removeprefix(f"{field}: "), limit=message.metadata.get("limit"))


def _pack(status: status_pb2.Status, detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)


def _cut(text: str, max_bytes: int) -> str:
    """At most that many bytes of UTF-8, whole characters; lone surrogates, which no message can carry, become question marks."""
    data = text.encode(errors="replace")
    return data.decode() if len(data) <= max_bytes else data[: max_bytes - len("…".encode())].decode(errors="ignore") + "…"


def _tree(kind: type[errors.BatonError]) -> list[type[errors.BatonError]]:
    return [kind] + [below for child in kind.__subclasses__() for below in _tree(child)]


# The others' constructors take more than a message.
_FROM_TEXT = [kind for kind in _tree(errors.BatonError) if kind not in (errors.CheckpointError, errors.ConfigurationError)]
_KINDS = {kind.reason: kind for kind in _FROM_TEXT}
_BY_CODE = {code.value[0]: kind for kind, code in reversed(CODES.items()) if kind in _FROM_TEXT}
