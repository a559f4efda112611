"""Errors as statuses and back: the table is complete, nothing leaks, nothing is lost on a real wire."""

import asyncio
import logging
import math
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import hypothesis.strategies as st
import pytest
import uvloop
from google.protobuf import duration_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from hypothesis import given

from protos.baton.v1 import common_pb2
from protos.baton.v1 import inference_pb2 as pb
from protos.baton.v1 import inference_pb2_grpc as pb_grpc
from services.core import errors
from services.core.errors import BatonError, InvalidRequest
from services.mesh import status
from services.mesh.client import open_channel
from tests.unit.mesh.serving import serving

HEADER_BYTES = 8192  # what Java's clients take by default; others take more


def _below(kind: type[BatonError]) -> list[type[BatonError]]:
    return [below for child in kind.__subclasses__() for below in (child, *_below(child)) if child.__module__ == errors.__name__]


TREE = _below(BatonError)
OWN_CONSTRUCTOR: dict[type[BatonError], BatonError] = {
    errors.InvalidRequest: errors.InvalidRequest("top_p", "2.0 is outside (0, 1]", limit="(0, 1]"),
    errors.ConfigurationError: errors.ConfigurationError(["BATON_X: no such setting", "BATON_Y: is not set"]),
    errors.CheckpointError: errors.CheckpointError("no such file", path="models/config.json"),
}


def example(kind: type[BatonError]) -> BatonError:
    if kind in OWN_CONSTRUCTOR:
        return OWN_CONSTRUCTOR[kind]
    if issubclass(kind, (errors.ResourceExhausted, errors.Unavailable)):
        return kind("need 7 KV blocks, 3 free", retry_after_s=2.5)
    return kind("need 7 KV blocks, 3 free")


def assert_same(found: BatonError, sent: BatonError) -> None:
    if isinstance(sent, errors.CheckpointError | errors.ConfigurationError):
        # Of another class, for a message does not make them; but with the same code and text.
        assert status.code_of(found) is status.code_of(sent)
        assert found.message.endswith(sent.message)
        return
    assert type(found) is type(sent)
    assert vars(found) == vars(sent)


# --- the table ---


def test_codes_when_the_tree_is_walked_decide_every_class() -> None:
    # A new error is given its code in CODES, itself or through a class between it and BatonError.
    undecided = [kind.__name__ for kind in TREE if not any(ancestor in status.CODES for ancestor in kind.__mro__)]
    assert not undecided
    assert BatonError not in status.CODES, "it would decide for every class that nobody has thought about"


def test_reasons_when_the_tree_is_walked_are_unique_so_that_they_name_a_class() -> None:
    kinds: list[type[BatonError]] = [BatonError, *TREE]
    reasons = [kind.reason for kind in kinds]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidRequest, "INVALID_ARGUMENT"),
        (errors.UnknownRequest, "NOT_FOUND"),
        (errors.UnknownModel, "NOT_FOUND"),
        (errors.QueueFull, "RESOURCE_EXHAUSTED"),
        (errors.OutOfBlocks, "RESOURCE_EXHAUSTED"),
        (errors.Overloaded, "RESOURCE_EXHAUSTED"),
        (errors.Draining, "UNAVAILABLE"),
        (errors.PeerUnavailable, "UNAVAILABLE"),
        (errors.EngineStopped, "UNAVAILABLE"),
        (errors.DeadlineExceeded, "DEADLINE_EXCEEDED"),
        (errors.SlowReader, "RESOURCE_EXHAUSTED"),
        (errors.Incompatible, "FAILED_PRECONDITION"),
        (errors.TransferFenced, "ABORTED"),
        (errors.ChecksumMismatch, "DATA_LOSS"),
        (errors.BatonError, "INTERNAL"),
    ],
)
def test_code_of_when_asked_about_an_error_follows_the_table_of_the_style(kind: type[BatonError], code: str) -> None:
    assert status.code_of(example(kind)).name == code


@pytest.mark.parametrize("error", [ValueError("x"), asyncio.CancelledError(), OSError(2, "x"), TimeoutError()])
def test_code_of_when_an_error_is_not_of_the_tree_is_internal(error: BaseException) -> None:
    assert status.code_of(error) is grpc.StatusCode.INTERNAL


# --- as a message ---


@pytest.mark.parametrize("kind", TREE)
def test_from_proto_when_given_what_to_proto_made_returns_the_error(kind: type[BatonError]) -> None:
    message = common_pb2.Error.FromString(status.to_proto(example(kind), "r1").SerializeToString())
    assert message.code == status.code_of(example(kind)).value[0]
    assert message.reason == kind.reason
    assert_same(status.from_proto(message), example(kind))


def test_to_proto_when_a_limit_is_a_number_sends_its_text_and_when_none_nothing() -> None:
    assert dict(status.to_proto(InvalidRequest("n", "129 is outside [1, 128]", limit=128), "r1").metadata) == {"field": "n", "limit": "128"}
    plain = status.to_proto(InvalidRequest("prompt", "is empty"), "r1")
    assert dict(plain.metadata) == {"field": "prompt"}
    found = status.from_proto(plain)
    assert isinstance(found, InvalidRequest) and (found.field, found.limit, found.message) == ("prompt", None, "prompt: is empty")


@pytest.mark.parametrize("error", [ValueError("secret"), BatonError("secret"), asyncio.CancelledError("secret")])
def test_to_proto_when_an_error_is_not_of_the_tree_tells_the_request_id_alone_and_logs_the_rest(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    message = status.to_proto(error, "r1")
    assert message == common_pb2.Error(code=13, message="internal error, request r1", reason="INTERNAL")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None and record.exc_info[1] is error
    assert vars(record)["request_id"] == "r1"


def test_to_proto_when_an_error_is_of_the_tree_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    status.to_proto(errors.QueueFull("full"), "r1")
    assert not caplog.records


def test_from_proto_when_an_error_was_internal_does_not_leak_at_the_next_hop_either(caplog: pytest.LogCaptureFixture) -> None:
    first = status.to_proto(ValueError("secret"), "r1")
    assert status.to_proto(status.from_proto(first), "r2").message == "internal error, request r2"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ResourceExhausted),
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.Incompatible),
        (grpc.StatusCode.NOT_FOUND, errors.UnknownRequest),
        (grpc.StatusCode.INTERNAL, errors.BatonError),
        (grpc.StatusCode.OUT_OF_RANGE, errors.BatonError),
    ],
)
def test_from_proto_when_a_reason_is_of_a_later_version_goes_by_the_code(code: grpc.StatusCode, kind: type[BatonError]) -> None:
    found = status.from_proto(common_pb2.Error(code=code.value[0], message="text", reason="OF_TOMORROW", retry_after_s=3.0))
    assert type(found) is kind
    assert found.message.endswith("text")
    assert getattr(found, "retry_after_s", 3.0) == 3.0


@pytest.mark.parametrize(("delay_s", "sent_s"), [(0.25, 0.25), (0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (math.inf, 3600.0)])
def test_to_status_when_a_retry_delay_is_out_of_all_limits_sends_one_within_them(delay_s: float, sent_s: float) -> None:
    error = errors.Overloaded("no worker would be in time", retry_after_s=delay_s)
    assert status.to_proto(error, "r1").retry_after_s == sent_s
    status.to_status(error, "r1")


@given(st.text(st.characters()), st.text(st.characters()), st.integers(0, 4000))
def test_to_proto_when_texts_are_of_any_length_and_kind_bounds_them(text: str, field: str, repeat: int) -> None:
    message = status.to_proto(InvalidRequest(field, text * repeat, limit=text * repeat), "r1")
    parsed = common_pb2.Error.FromString(message.SerializeToString())
    whole = f"{field}: {text * repeat}".encode(errors="replace").decode()
    if len(whole.encode()) <= status.MAX_MESSAGE_BYTES:
        assert parsed.message == whole
    else:
        assert parsed.message.endswith("…") and whole.startswith(parsed.message[:-1])
        assert status.MAX_MESSAGE_BYTES - 6 <= len(parsed.message.encode()) <= status.MAX_MESSAGE_BYTES
    assert all(len(value.encode()) <= status.MAX_METADATA_BYTES for value in parsed.metadata.values())


NUMBERS = st.floats() | st.sampled_from([0.0, -1.0, 1e308, math.inf, math.nan])
WORDS = st.text(max_size=20) | st.text(max_size=20).map(lambda text: text * 300)
ERRORS = st.builds(
    common_pb2.Error,
    code=st.integers(0, 2**32 - 1) | st.integers(0, 17),
    message=WORDS,
    reason=st.sampled_from([kind.reason for kind in _below(BatonError)]) | WORDS,
    retry_after_s=NUMBERS,
    metadata=st.dictionaries(st.sampled_from(["field", "limit"]) | WORDS, WORDS, max_size=3),
)


def assert_can_be_told(error: BatonError) -> None:
    message = status.to_proto(error, "r1")
    assert len(message.message.encode()) <= status.MAX_MESSAGE_BYTES
    assert all(len(value.encode()) <= status.MAX_METADATA_BYTES for value in message.metadata.values())
    assert 0 <= message.retry_after_s <= status.MAX_RETRY_AFTER_S
    assert len(status.to_status(error, "r1").trailing_metadata[0][1]) < 4096


@given(ERRORS)
def test_from_proto_when_a_peer_sends_any_error_gives_one_of_the_tree_that_can_be_told_on(message: common_pb2.Error) -> None:
    error = status.from_proto(message)
    assert isinstance(error, BatonError)
    assert_can_be_told(error)


INFOS = st.builds(
    error_details_pb2.ErrorInfo,
    reason=st.sampled_from([kind.reason for kind in _below(BatonError)]) | WORDS,
    domain=st.sampled_from([status.DOMAIN, "other"]),
    metadata=st.dictionaries(st.sampled_from(["field", "limit"]) | WORDS, WORDS, max_size=3),
)
RETRIES = st.builds(
    lambda seconds, nanos: error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=seconds, nanos=nanos)),
    st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5),
    st.integers(-(2**31), 2**31 - 1),
)
NAMES = ("google.rpc.ErrorInfo", "google.rpc.RetryInfo", "baton.v1.Error")
JUNK = st.builds(AnyMessage, type_url=st.sampled_from(NAMES).map("type.googleapis.com/{}".format), value=st.binary(max_size=30))


def packed(detail: Any) -> AnyMessage:
    if isinstance(detail, AnyMessage):
        return detail
    message = AnyMessage()
    message.Pack(detail)
    return message


DETAILS = st.lists((INFOS | RETRIES | JUNK).map(packed), max_size=4).map(
    lambda details: status_pb2.Status(details=details).SerializeToString()
)


@given(st.sampled_from(grpc.StatusCode), st.none() | WORDS, DETAILS | st.binary(max_size=60))
def test_from_rpc_error_when_a_status_is_anything_gives_an_error_of_the_tree_that_can_be_told_on(
    code: grpc.StatusCode, text: str | None, details: bytes
) -> None:
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", details))
    error = status.from_rpc_error(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=text), "peer")
    assert isinstance(error, BatonError)
    assert_can_be_told(error)


# --- over a real wire ---


async def caught(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


def fails_with(error: BaseException) -> Callable[[Any, Any], Any]:
    async def tokenize(request: Any, context: Any) -> pb.TokenizeResponse:
        raise error

    return tokenize


@pytest.mark.parametrize("kind", TREE)
def test_call_when_a_handler_raises_an_error_of_the_tree_ends_with_its_rich_status(kind: type[BatonError]) -> None:
    async def generate(request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(text="a")
        raise example(kind)

    async def main() -> None:
        async with serving(tokenize=fails_with(example(kind)), generate=generate) as (_, channel):
            stub = pb_grpc.InferenceServiceStub(channel)
            once = stub.Tokenize(pb.TokenizeRequest())
            stream = stub.Generate(pb.GenerateRequest())
            assert (await stream.read()).text == "a"
            for call, waiting in ((once, once), (stream, stream.read())):
                error = await caught(waiting)
                assert error.code() is status.code_of(example(kind))
                assert error.details() == example(kind).message
                assert_same(status.from_rpc_error(error, "decode-0"), example(kind))
                # As any client of gRPC reads it.
                rich = await rpc_status.aio.from_call(call)
                assert (rich.code, rich.message) == (error.code().value[0], error.details())
                info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
                assert rich.details[0].Unpack(info)
                assert (info.reason, info.domain) == (kind.reason, "baton")
                expected = {"field": "top_p", "limit": "(0, 1]"} if kind is InvalidRequest else {}
                assert dict(info.metadata) == expected
                if hasattr(example(kind), "retry_after_s"):
                    assert rich.details[1].Unpack(retry)
                    assert retry.retry_delay.ToMilliseconds() == 2500
                else:
                    assert len(rich.details) == 1

    uvloop.run(main())


@pytest.mark.parametrize("letter", ["x", "é", "日", "😀", "\n", "%", "\ud800"])
def test_call_when_a_message_is_longer_than_headers_ends_with_its_code_and_the_beginning(letter: str) -> None:
    async def main() -> None:
        long = InvalidRequest(letter * 10_000, letter * 100_000, limit=letter * 10_000)
        async with serving(tokenize=fails_with(long)) as (server, _):
            # A client that refuses any more than HEADER_BYTES.
            options = [("grpc.max_metadata_size", HEADER_BYTES), ("grpc.absolute_max_metadata_size", HEADER_BYTES)]
            async with grpc.aio.insecure_channel(server.address, options=options) as channel:
                long_id = [("x-request-id", "~" * 128)]
                error = await caught(pb_grpc.InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest(), metadata=long_id))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                shown = "?" if letter == "\ud800" else letter
                assert (error.details() or "").startswith(shown * 300)
                found = status.from_rpc_error(error, "router")
                assert isinstance(found, InvalidRequest) and found.field.startswith(shown * 40)

    uvloop.run(main())


def test_call_when_a_handler_fails_tells_the_request_id_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> grpc.aio.AioRpcError:
        async with serving(tokenize=fails_with(KeyError("secret"))) as (_, channel):
            call = pb_grpc.InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest(), metadata=[("x-request-id", "mine")])
            return await caught(call)

    error = uvloop.run(main())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "internal error, request mine"
    everything = repr((error.initial_metadata(), error.trailing_metadata(), error.debug_error_string()))
    assert "secret" not in everything and "KeyError" not in everything
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None and repr(record.exc_info[1]) == "KeyError('secret')"
    assert vars(record)["request_id"] == "mine"
    assert type(status.from_rpc_error(error, "router")) is BatonError


def with_details(details: bytes, code: grpc.StatusCode) -> Callable[[Any, Any], Any]:
    async def tokenize(request: Any, context: Any) -> None:
        await context.abort(code, "text", (("grpc-status-details-bin", details), ("other", "x")))

    return tokenize


def from_foreign_server(tokenize: Callable[[Any, Any], Any], *, timeout_s: float = 10.0) -> BatonError:
    """What from_rpc_error makes of a call to a gRPC server without any of Baton's frame."""

    async def main() -> BatonError:
        servicer: Any = pb_grpc.InferenceServiceServicer()
        servicer.Tokenize = tokenize
        server = grpc.aio.server()
        pb_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with open_channel(f"127.0.0.1:{port}") as channel:
                call = pb_grpc.InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest(), timeout=timeout_s)
                return status.from_rpc_error(await caught(call), "decode-0")
        finally:
            await server.stop(None)

    return uvloop.run(main())


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest, "request: text"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ResourceExhausted, "decode-0: text"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded, "decode-0 did not answer in time"),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Incompatible, "decode-0 does not know this call: it speaks another version of the protocol"),
        (grpc.StatusCode.UNAVAILABLE, errors.PeerUnavailable, "decode-0: unavailable: text"),
        (grpc.StatusCode.INTERNAL, errors.PeerUnavailable, "decode-0: internal: text"),
        (grpc.StatusCode.UNKNOWN, errors.PeerUnavailable, "decode-0: unknown: text"),
        (grpc.StatusCode.CANCELLED, errors.PeerUnavailable, "decode-0: cancelled: text"),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PeerUnavailable, "decode-0: permission denied: text"),
    ],
)
@pytest.mark.parametrize("details", ["none", "junk", "of another domain"])
def test_from_rpc_error_when_baton_did_not_make_the_status_goes_by_its_code(
    code: grpc.StatusCode, kind: type[BatonError], message: str, details: str
) -> None:
    async def without(request: Any, context: Any) -> None:
        await context.abort(code, "text")

    packed = AnyMessage()
    packed.Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="example.com", metadata={"field": "x"}))
    foreign = status_pb2.Status(code=code.value[0], message="text", details=[packed]).SerializeToString()
    tokenize = {"none": without, "junk": with_details(b"\xff\xff", code), "of another domain": with_details(foreign, code)}[details]
    found = from_foreign_server(tokenize)
    assert type(found) is kind
    assert found.message == message


def test_from_rpc_error_when_a_detail_within_the_status_is_junk_goes_by_the_code() -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    junk = AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
    details = status_pb2.Status(code=code.value[0], message="text", details=[junk]).SerializeToString()
    assert type(from_foreign_server(with_details(details, code))) is errors.ResourceExhausted


def test_from_rpc_error_when_the_deadline_passes_is_deadline_exceeded() -> None:
    async def tokenize(request: Any, context: Any) -> None:
        await asyncio.Event().wait()

    found = from_foreign_server(tokenize, timeout_s=0.05)
    assert (type(found), found.message) == (errors.DeadlineExceeded, "decode-0 did not answer in time")


def test_from_rpc_error_when_a_handler_outside_of_the_frame_fails_is_peer_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    assert type(from_foreign_server(fails_with(ValueError("x")))) is errors.PeerUnavailable


def test_from_rpc_error_when_nobody_listens_is_peer_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

    async def main() -> BatonError:
        async with open_channel(address) as channel:
            call = pb_grpc.InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest(), timeout=10)
            return status.from_rpc_error(await caught(call), address)

    found = uvloop.run(main())
    assert type(found) is errors.PeerUnavailable
    assert found.message.startswith(f"{address}: unavailable: ")


@pytest.mark.parametrize("direction", ["request", "response"])
def test_from_rpc_error_when_a_message_is_too_large_for_the_receiver_is_resource_exhausted(direction: str) -> None:
    async def tokenize(request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=common_pb2.TokenIds(packed=bytes(100_000)))

    async def main() -> BatonError:
        async with serving(tokenize=tokenize, max_message_bytes=50_000) as (server, _):
            options = [("grpc.max_receive_message_length", 50_000)]
            async with grpc.aio.insecure_channel(server.address, options=options) as channel:
                stub = pb_grpc.InferenceServiceStub(channel)
                call = stub.Tokenize(pb.TokenizeRequest(text="x" * (100_000 if direction == "request" else 1)), timeout=10)
                return status.from_rpc_error(await caught(call), "router")

    found = uvloop.run(main())
    assert type(found) is errors.ResourceExhausted
    assert "larger than max" in found.message
