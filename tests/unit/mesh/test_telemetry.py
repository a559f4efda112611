"""The trace context of a call: passed on as it came, or not at all."""

import asyncio
from typing import Any

import pytest
import uvloop

from protos.baton.v1 import inference_pb2 as pb
from protos.baton.v1 import inference_pb2_grpc as pb_grpc
from services.mesh.telemetry import trace_context
from tests.unit.mesh.serving import serving

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("metadata", "context"),
    [
        (None, {}),
        ((), {}),
        ((("x-request-id", "r1"),), {}),
        ((("traceparent", PARENT),), {"traceparent": PARENT}),
        ((("tracestate", "a=1"), ("x", "y"), ("traceparent", PARENT)), {"traceparent": PARENT, "tracestate": "a=1"}),
        ((("traceparent", "x" * 512), ("tracestate", "x" * 513)), {"traceparent": "x" * 512}),
        ((("traceparent", b"bytes"),), {}),
        ((("Traceparent", PARENT),), {}),
    ],
)
def test_trace_context_when_read_from_metadata_has_the_two_fields_that_are_short_text(metadata: Any, context: dict[str, str]) -> None:
    assert trace_context(metadata) == context


def test_trace_context_when_a_client_sends_it_reaches_the_handler() -> None:
    seen = []

    async def tokenize(request: Any, context: Any) -> pb.TokenizeResponse:
        seen.append(trace_context(context.invocation_metadata()))
        return pb.TokenizeResponse()

    async def main() -> None:
        async with serving(tokenize=tokenize) as (_, channel), asyncio.timeout(10):
            metadata = (("traceparent", PARENT), ("tracestate", "vendor=1"))
            await pb_grpc.InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest(), metadata=metadata)

    uvloop.run(main())
    assert seen == [{"traceparent": PARENT, "tracestate": "vendor=1"}]
