"""What clients can do wrong over gRPC, against a small mesh: a typed error at once, nobody else waits, and nothing is left behind."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from protos.baton.v1 import common_pb2, inference_pb2
from services.core import errors
from services.core.types import SamplingParams
from services.mesh import convert, status
from tests.mesh import Mesh, Reply

GENERATE = "/baton.v1.InferenceService/Generate"
TOKENIZE = "/baton.v1.InferenceService/Tokenize"
DETOKENIZE = "/baton.v1.InferenceService/Detokenize"
LIST_MODELS = "/baton.v1.InferenceService/ListModels"
PROMPT = "def read_json(path):\n    "
GOOD = SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=12, ignore_eos=True)
# Everybody shares this test's one event loop and two cores, and a message of 16 MB has to be read before it can be refused.
ANSWER_S, STALL_S = 10.0, 1.5


@dataclass(slots=True)
class Bench:
    """A mesh of one prefill and one decode worker, and how long a small call had to wait for its answer at most since `worst_s` was 0."""

    mesh: Mesh
    router: str
    worst_s: float = 0.0

    async def call(self, method: str, data: bytes, **options: Any) -> errors.BatonError | None:
        """Sends bytes as the request of a method; the error it ends with, None: it ends well."""
        start: Any = self.mesh.channel(self.router).unary_stream(method)
        call = start(data, **{"timeout": ANSWER_S, **options})
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return status.from_rpc_error(error, "router")
        return None

    async def probe(self) -> None:
        """Small calls, one after the other, until cancelled."""
        data = inference_pb2.TokenizeRequest(text="x").SerializeToString()
        while True:
            started = time.perf_counter()
            assert await self.call(TOKENIZE, data) is None
            self.worst_s = max(self.worst_s, time.perf_counter() - started)
            await asyncio.sleep(0.005)


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    """Afterwards a good request must get the tokens that it got before, and no block may be in anybody's hands."""
    async with Mesh("demo") as mesh:
        router = await mesh.router([await mesh.prefill("p0"), await mesh.decode("d0")], max_local_tokens=0)
        before = await mesh.generate(router, PROMPT, GOOD)
        bench = Bench(mesh, router)
        probing = asyncio.ensure_future(bench.probe())
        await asyncio.sleep(0.05)
        bench.worst_s = 0.0
        yield bench
        assert bench.worst_s < STALL_S
        assert not probing.done(), probing.exception()
        probing.cancel()
        assert_same(before, await mesh.generate(router, PROMPT, GOOD))
        for load in (await mesh.loads(router)).values():
            assert load.blocks_free + load.blocks_cached == load.blocks_total


def assert_same(before: Reply, after: Reply) -> None:
    assert (after.tokens, after.texts, after.finish_reasons) == (before.tokens, before.texts, before.finish_reasons)


def run(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(120), bench() as ready:
            await test(ready)

    asyncio.run(main())


def generate(**fields: Any) -> bytes:
    return inference_pb2.GenerateRequest(**{"prompt": inference_pb2.Prompt(text=PROMPT), **fields}).SerializeToString()


def sampling(**fields: Any) -> bytes:
    return generate(sampling=common_pb2.SamplingParams(**{"max_tokens": 2, **fields}))


def token_ids(values: Sequence[int]) -> common_pb2.TokenIds:
    return convert.token_ids_to_proto(values)


def chat(*messages: tuple[str, str]) -> inference_pb2.Chat:
    return inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in messages])


NAN, INF, MOST = math.nan, math.inf, 2**32 - 1
LIMITS: dict[str, str] = {
    "temperature": "[0.0, 100.0]",
    "top_p": "(0.0, 1.0]",
    "min_p": "[0.0, 1.0]",
    "frequency_penalty": "[-2.0, 2.0]",
    "presence_penalty": "[-2.0, 2.0]",
    "repetition_penalty": "(0.0, 100.0]",
    "n": "[1, 128]",
    "logprobs": "[0, 20]",
}
OUTSIDE: list[tuple[str, Sequence[float]]] = [
    ("temperature", [-1e-300, 100.1, NAN, INF, -INF]),
    ("top_p", [0.0, -0.0, 1.0000001, NAN, INF]),
    ("min_p", [-1e-300, 1.0000001, NAN, INF]),
    ("frequency_penalty", [-2.1, 2.1, NAN, INF]),
    ("presence_penalty", [-2.1, 2.1, NAN, -INF]),
    ("repetition_penalty", [0.0, -1.0, 100.1, NAN, INF]),
    ("n", [0, 129, MOST]),
    ("logprobs", [21, MOST]),
]
WITHIN: list[tuple[str, Sequence[Any]]] = [
    ("temperature", [0.0, 5e-324, 100.0]),
    ("top_p", [5e-324, 1.0]),
    ("min_p", [0.0, 1.0]),
    ("frequency_penalty", [-2.0, 2.0]),
    ("presence_penalty", [-2.0, 2.0]),
    ("repetition_penalty", [5e-324, 100.0]),
    ("top_k", [0, MOST]),
    ("seed", [0, 2**64 - 1]),
    ("n", [1, 128]),
    ("logprobs", [0, 20]),
    ("min_tokens", [2]),
    ("stop_token_ids", [[0, 4095] * 512]),
    ("logit_bias", [{0: -100.0, 4095: 100.0}]),
]


def test_sampling_when_at_its_limits_is_served_and_beyond_them_refused_with_field_and_limit() -> None:
    async def test(bench: Bench) -> None:
        for field, values in OUTSIDE:
            for value in values:
                error = await bench.call(GENERATE, sampling(**{field: value}))
                assert isinstance(error, errors.InvalidRequest), (field, value, error)
                assert (error.field, error.limit) == (field, LIMITS[field]), (field, value, error.message)
        for field, values in WITHIN:
            for value in values:
                assert await bench.call(GENERATE, sampling(**{field: value})) is None, (field, value)

    run(test)


def other_cases() -> list[tuple[str, bytes, type[errors.BatonError], str, str | None]]:
    """(method, request, error, field, limit; None: whatever it is)."""
    invalid, prompt = errors.InvalidRequest, inference_pb2.Prompt
    long_text = "x " * 7_900_000
    biases = {key: 1.0 for key in range(1_000_000)}
    return [
        (GENERATE, sampling(max_tokens=0), invalid, "max_tokens", "[1, ∞)"),
        (GENERATE, sampling(max_tokens=4096), invalid, "max_tokens", None),
        (GENERATE, sampling(max_tokens=MOST, n=128), invalid, "max_tokens", None),
        (GENERATE, sampling(min_tokens=3), invalid, "min_tokens", "2"),
        (GENERATE, sampling(min_tokens=MOST), invalid, "min_tokens", "2"),
        (GENERATE, sampling(stop_token_ids=[4096]), invalid, "stop_token_ids", "4095"),
        (GENERATE, sampling(stop_token_ids=[5] * 1_000_000), invalid, "stop_token_ids", "1024"),
        (GENERATE, sampling(logit_bias={4096: 1.0}), invalid, "logit_bias", "4095"),
        (GENERATE, sampling(logit_bias={5: NAN}), invalid, "logit_bias[5]", "[-100.0, 100.0]"),
        (GENERATE, sampling(logit_bias={5: -100.1}), invalid, "logit_bias[5]", "[-100.0, 100.0]"),
        (GENERATE, sampling(logit_bias=biases), invalid, "logit_bias", "4096"),
        (GENERATE, generate(stop=[f"{number}" for number in range(17)]), invalid, "stop", "16"),
        (GENERATE, generate(stop=["ab"] * 3_000_000), invalid, "stop", "16"),
        (GENERATE, generate(stop=["x" * 1025]), invalid, "stop", "1024"),
        (GENERATE, generate(stop=[""]), invalid, "stop", "1024"),
        (GENERATE, generate(cache_salt="é" * 513), invalid, "cache_salt", "1024"),
        (GENERATE, generate(model="x" * 1_000_000), errors.UnknownModel, "", None),
        (GENERATE, inference_pb2.GenerateRequest().SerializeToString(), invalid, "prompt", None),
        (GENERATE, generate(prompt=prompt()), invalid, "prompt", None),
        (GENERATE, generate(prompt=prompt(text="")), invalid, "prompt", "1"),
        (GENERATE, generate(prompt=prompt(text=long_text)), invalid, "prompt.text", None),
        (GENERATE, generate(prompt=prompt(token_ids=token_ids([]))), invalid, "prompt", "1"),
        (GENERATE, generate(prompt=prompt(token_ids=token_ids([5] * 4096))), invalid, "prompt", "4095"),
        (GENERATE, generate(prompt=prompt(token_ids=token_ids([5] * 4_000_000))), invalid, "prompt", "4095"),
        (GENERATE, generate(prompt=prompt(token_ids=token_ids([5, 4096]))), invalid, "prompt", "4095"),
        (GENERATE, generate(prompt=prompt(token_ids=token_ids([MOST]))), invalid, "prompt", "4095"),
        (GENERATE, generate(prompt=prompt(token_ids=common_pb2.TokenIds(packed=b"12345"))), invalid, "prompt.token_ids", "4"),
        (GENERATE, generate(prompt=prompt(chat=chat())), invalid, "chat.messages", "1"),
        (GENERATE, generate(prompt=prompt(chat=inference_pb2.Chat.FromString(b"\x0a\x00" * 2_000_000))), invalid, "chat.messages", "4096"),
        (GENERATE, generate(prompt=prompt(chat=chat(("user", long_text)))), invalid, "chat", None),
        (TOKENIZE, b"", invalid, "kind", None),
        (TOKENIZE, inference_pb2.TokenizeRequest(text=long_text).SerializeToString(), invalid, "text", None),
        (TOKENIZE, inference_pb2.TokenizeRequest(chat=chat()).SerializeToString(), invalid, "chat.messages", "1"),
        (TOKENIZE, inference_pb2.TokenizeRequest(model="other", text="x").SerializeToString(), errors.UnknownModel, "", None),
        (DETOKENIZE, inference_pb2.DetokenizeRequest(token_ids=token_ids([4096])).SerializeToString(), invalid, "token_ids", "4095"),
        (DETOKENIZE, inference_pb2.DetokenizeRequest(token_ids=token_ids([MOST])).SerializeToString(), invalid, "token_ids", "4095"),
        (DETOKENIZE, inference_pb2.DetokenizeRequest(token_ids=token_ids([5] * 4097)).SerializeToString(), invalid, "token_ids", "4096"),
        (DETOKENIZE, b"\x12\x03\x0a\x01\x01", invalid, "token_ids", "4"),
        # Not UTF-8, where a string is due; cut off; a field of another kind; groups that never end; nothing of ours.
        (GENERATE, b"\x0a\x02\xff\xfe", invalid, "request", None),
        (GENERATE, b"\x12\x04\x0a\x02\xc3\x28", invalid, "request", None),
        (GENERATE, generate()[:-1], invalid, "request", None),
        (GENERATE, b"\x0a\xff\xff\xff\xff\x0f", invalid, "request", None),
        (GENERATE, b"\x1b" * 100_000, invalid, "request", None),
        (TOKENIZE, b"GET / HTTP/1.1\r\n\r\n", invalid, "request", None),
        (DETOKENIZE, bytes(range(256)), invalid, "request", None),
        (LIST_MODELS, b"\xff", invalid, "request", None),
    ]


def test_requests_when_wrong_in_any_other_way_are_refused_with_field_and_limit() -> None:
    cases = other_cases()  # not while the mesh runs, which would stand still for it

    async def test(bench: Bench) -> None:
        for method, data, kind, field, limit in cases:
            error = await bench.call(method, data)
            assert type(error) is kind, (method, data[:60], error)
            assert len(error.message) < 2000
            if isinstance(error, errors.InvalidRequest):
                assert (error.field, limit or error.limit) == (field, error.limit), (method, data[:60], error.message)

    run(test)


def test_messages_when_too_large_or_packed_as_nobody_agreed_are_refused_by_the_server() -> None:
    async def test(bench: Bench) -> None:
        huge = await bench.call(GENERATE, bytes(100_000_000), timeout=60.0)
        assert isinstance(huge, errors.ResourceExhausted) and "16777216" in huge.message
        unpacked = inference_pb2.TokenizeRequest(text="x" * 60_000_000).SerializeToString()
        for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            bomb = await bench.call(TOKENIZE, unpacked, compression=compression)
            assert isinstance(bomb, errors.ResourceExhausted), "it was unpacked before it was refused"
        for method in ("/baton.v1.InferenceService/Nothing", "/nobody"):
            assert isinstance(await bench.call(method, b"x"), errors.Incompatible)
        # A stream of requests where one is due, and none at all: the library waits for what it thinks proper until the caller's deadline.
        streaming: Any = bench.mesh.channel(bench.router).stream_stream(GENERATE)
        for requests in ([generate()] * 3, []):
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in streaming(iter(requests), timeout=0.3):
                    pass

    run(test)


def test_metadata_and_deadlines_when_absurd_cost_their_own_call_only() -> None:
    async def test(bench: Bench) -> None:
        small = sampling(temperature=0.0)
        for metadata in (
            [("x-request-id", "i" * 129)],
            [("x-request-id", "a"), ("x-request-id", "b")],
            [("traceparent", "t" * 4000), ("tracestate", "")],
            [(f"x-{number}", "v") for number in range(200)],
            [("x-bytes-bin", bytes(1000))],
        ):
            assert await bench.call(GENERATE, small, metadata=metadata) is None, metadata[0]
        refused = await bench.call(GENERATE, small, metadata=[("x-huge", "v" * 100_000)])
        assert isinstance(refused, errors.BatonError)
        for timeout in (-1.0, 1e-9, 1e300, NAN):  # the last two: as the library counts them, over before they began
            assert isinstance(await bench.call(GENERATE, small, timeout=timeout), errors.DeadlineExceeded), timeout
        assert await bench.call(GENERATE, small, timeout=1e9) is None
        for raw in ("0n", "99999999H", "-5S", "1e300S", "S", "123456789S", "9" * 500):
            await bench.call(GENERATE, small, metadata=[("grpc-timeout", raw)])

    run(test)


def test_choices_when_as_many_and_as_long_as_can_be_are_freed_when_the_client_leaves() -> None:
    async def test(bench: Bench) -> None:
        start: Any = bench.mesh.channel(bench.router).unary_stream(GENERATE)
        call = start(sampling(n=128, max_tokens=4000, ignore_eos=True))
        await call.read()
        call.cancel()

    run(test)
