"""Requests as clients send them, through a small mesh on the demo model: what they get, what they are told, what is freed."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest

from protos.baton.v1 import common_pb2, decode_pb2, decode_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.core import errors
from services.core.types import FinishReason, SamplingParams
from services.engine.core import EngineCore
from services.mesh import convert, status
from services.mesh.streams import SILENCE_S
from services.router import decode_session
from tests.mesh import Mesh
from tests.waiting import wait_until

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
LONG = SamplingParams(temperature=0.0, max_tokens=2000, ignore_eos=True)
PROMPT = "def read_json(path):\n    "


@dataclass(frozen=True, slots=True)
class Small:
    """One prefill and one decode worker, and two routers: `router` sends every prompt to prefill, `narrow` takes one request at a time."""

    mesh: Mesh
    router: str
    narrow: str


@asynccontextmanager
async def small_mesh() -> AsyncIterator[Small]:
    async with Mesh("demo") as mesh:
        workers = [await mesh.prefill("p0"), await mesh.decode("d0")]
        router = await mesh.router(workers, max_local_tokens=0)
        yield Small(mesh, router, await mesh.router(workers, max_in_flight=1))


def run(test: Callable[[Small], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with small_mesh() as small:
            await test(small)
            await small.mesh.loads(small.router)  # nothing runs and no block is owned afterwards

    asyncio.run(main())


async def refusal(small: Small, router: str = "", **fields: Any) -> errors.BatonError:
    """The error with which a request ends."""
    try:
        async for _ in small.mesh.stub(router or small.router).Generate(inference_pb2.GenerateRequest(**fields)):
            pass
    except grpc.aio.AioRpcError as error:
        return status.from_rpc_error(error, "router")
    raise AssertionError("no error")


def test_bad_requests_when_sent_are_refused_with_field_and_limit() -> None:
    text = inference_pb2.Prompt(text=PROMPT)
    cases: list[tuple[str, object, dict[str, Any]]] = [
        ("prompt", None, {}),
        ("prompt", "1", {"prompt": inference_pb2.Prompt(text="")}),
        ("prompt", "4095", {"prompt": inference_pb2.Prompt(token_ids=convert.token_ids_to_proto([5] * 4096))}),
        ("prompt", "4095", {"prompt": inference_pb2.Prompt(token_ids=convert.token_ids_to_proto([4096]))}),
        # Refused for its length, before seconds of tokenizing.
        ("prompt.text", None, {"prompt": inference_pb2.Prompt(text="x " * 5_000_000)}),
        ("prompt.token_ids", "4", {"prompt": inference_pb2.Prompt(token_ids=common_pb2.TokenIds(packed=b"12345"))}),
        ("chat.messages", "1", {"prompt": inference_pb2.Prompt(chat=inference_pb2.Chat())}),
        ("temperature", "[0.0, 100.0]", {"prompt": text, "sampling": common_pb2.SamplingParams(temperature=float("nan"))}),
        ("temperature", "[0.0, 100.0]", {"prompt": text, "sampling": common_pb2.SamplingParams(temperature=-1)}),
        ("n", "[1, 128]", {"prompt": text, "sampling": common_pb2.SamplingParams(n=4_000_000_000)}),
        ("max_tokens", None, {"prompt": text, "sampling": common_pb2.SamplingParams(max_tokens=5000)}),
        ("stop", "16", {"prompt": text, "stop": ["x"] * 17}),
        ("stop", "1024", {"prompt": text, "stop": [""]}),
        ("cache_salt", "1024", {"prompt": text, "cache_salt": "s" * 1025}),
        ("logit_bias", "4095", {"prompt": text, "sampling": common_pb2.SamplingParams(logit_bias={5000: 1.0})}),
    ]

    async def test(small: Small) -> None:
        for field, limit, fields in cases:
            error = await refusal(small, **fields)
            assert isinstance(error, errors.InvalidRequest), (fields, error)
            assert error.field == field, (fields, error.message)
            assert limit is None or error.limit == limit, (fields, error.limit)
        assert isinstance(await refusal(small, model="other", prompt=text), errors.UnknownModel)
        assert (await small.mesh.generate(small.router, PROMPT, GREEDY)).usage.completion_tokens > 0

    run(test)


def test_stop_string_when_it_comes_ends_the_text_before_it() -> None:
    async def test(small: Small) -> None:
        whole = await small.mesh.generate(small.router, PROMPT, GREEDY)
        text = whole.texts[0]
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        cut = await small.mesh.generate(small.router, PROMPT, GREEDY, stop=[stop])
        assert cut.texts[0] == text[: text.index(stop)]
        assert cut.finish_reasons == [FinishReason.STOP]
        assert cut.tokens[0] == whole.tokens[0][: len(cut.tokens[0])]
        assert cut.usage.completion_tokens == len(cut.tokens[0]) < len(whole.tokens[0])

    run(test)


def test_text_when_streamed_is_the_decode_of_its_tokens() -> None:
    async def test(small: Small) -> None:
        stub = small.mesh.stub(small.router)
        reply = await small.mesh.generate(
            small.router, PROMPT, replace(GREEDY, temperature=1.0, seed=3, n=3, max_tokens=40, ignore_eos=True)
        )
        for tokens, text in zip(reply.tokens, reply.texts, strict=True):
            whole = await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=convert.token_ids_to_proto(tokens)))
            assert text == whole.text
        ids = await stub.Tokenize(inference_pb2.TokenizeRequest(text=PROMPT))
        assert reply.usage.prompt_tokens == len(ids.token_ids.packed) // 4
        models = await stub.ListModels(inference_pb2.ListModelsRequest())
        assert [model.name for model in models.models] == ["demo"]

    run(test)


def test_salt_when_it_differs_no_prefix_is_shared() -> None:
    async def test(small: Small) -> None:
        prompt = list(range(300, 400))

        async def cached(salt: str) -> int:
            reply = await small.mesh.generate(small.router, prompt, GREEDY, cache_salt=salt)
            return reply.usage.cached_tokens

        assert [await cached(salt) for salt in ("a", "b", "a", "")] == [0, 0, 96, 0]

    run(test)


def test_request_when_the_client_leaves_is_freed_everywhere() -> None:
    """Cancelled after its first token, and while its prompt is computed."""

    async def test(small: Small) -> None:
        for tokens in (list(range(300, 330)), [300 + index % 3000 for index in range(2000)]):
            call = small.mesh.stub(small.router).Generate(
                inference_pb2.GenerateRequest(
                    prompt=inference_pb2.Prompt(token_ids=convert.token_ids_to_proto(tokens)), sampling=convert.sampling_to_proto(LONG)
                )
            )
            if len(tokens) < 100:
                await call.read()
            else:
                await small.mesh.wait_for(small.router, lambda status: status.workers[0].load.blocks_owned > 0)
            call.cancel()
            seen = await small.mesh.status(small.router)
            await wait_until(lambda: is_quiet(small), timeout_s=2.0)
            assert seen.failed == 0
        assert (await small.mesh.status(small.router)).cancelled == 2

    run(test)


async def is_quiet(small: Small) -> bool:
    status = await small.mesh.status(small.router)
    return status.in_flight == 0 and all(worker.load.blocks_owned == 0 for worker in status.workers)


def test_request_when_its_deadline_passes_ends_with_deadline_exceeded() -> None:
    async def test(small: Small) -> None:
        request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text=PROMPT), sampling=convert.sampling_to_proto(LONG))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in small.mesh.stub(small.router).Generate(request, timeout=0.4):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await wait_until(lambda: is_quiet(small), timeout_s=2.0)

    run(test)


def test_router_when_it_is_full_refuses_with_a_retry_delay() -> None:
    async def test(small: Small) -> None:
        stub = small.mesh.stub(small.narrow)
        request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text=PROMPT), sampling=convert.sampling_to_proto(LONG))
        call = stub.Generate(request)
        await call.read()
        error = await refusal(small, small.narrow, prompt=inference_pb2.Prompt(text=PROMPT))
        assert isinstance(error, errors.QueueFull)
        assert error.retry_after_s > 0
        call.cancel()
        await wait_until(lambda: takes_one(small), timeout_s=2.0)
        seen = await small.mesh.status(small.narrow)
        assert (seen.shed, seen.in_flight) == (1, 0)

    run(test)


async def takes_one(small: Small) -> bool:
    return (await small.mesh.status(small.narrow)).in_flight == 0


def test_request_id_when_the_client_gives_one_is_returned_and_used() -> None:
    async def test(small: Small) -> None:
        request = inference_pb2.GenerateRequest(
            prompt=inference_pb2.Prompt(text=PROMPT), sampling=convert.sampling_to_proto(GREEDY), include_timing=True
        )
        call = small.mesh.stub(small.router).Generate(request, metadata=(("x-request-id", "mine-1"),))
        last = [response async for response in call][-1]
        assert dict(await call.initial_metadata())["x-request-id"] == "mine-1"
        assert last.timing.request_id == "mine-1"

    run(test)


def test_prompt_when_the_prefill_worker_is_gone_is_computed_on_decode() -> None:
    """The router may still believe in p0 for the first request; the decode worker finds out and goes on by itself."""

    async def test(small: Small) -> None:
        mesh = small.mesh
        before = await mesh.generate(small.router, PROMPT * 20, GREEDY)
        assert before.timing.prefill_worker_id == "p0"
        await mesh.stop("p0")
        after = await mesh.generate(small.router, PROMPT * 21, GREEDY)
        assert after.timing.prefill_worker_id == ""
        assert after.usage.completion_tokens > 0

    run(test)


def test_workers_when_their_layouts_differ_are_shown_and_not_paired() -> None:
    async def main() -> None:
        async with Mesh("demo") as mesh:
            other = await mesh.prefill("p0", block_size=32)
            decode = await mesh.decode("d0")
            router = await mesh.router([decode])
            both = mesh.router_over([other, decode])
            seen = await mesh.wait_for(both, lambda status: "incompatible" in {worker.state for worker in status.workers})
            assert {worker.worker.worker_id: worker.state for worker in seen.workers} == {"p0": "incompatible", "d0": "up"}
            replies = [await mesh.generate(address, PROMPT, GREEDY) for address in (router, both)]
            assert replies[0].tokens == replies[1].tokens
            assert replies[1].timing.prefill_worker_id == ""

    asyncio.run(main())


def test_logprobs_when_asked_for_belong_to_their_tokens() -> None:
    async def test(small: Small) -> None:
        reply = await small.mesh.generate(small.router, PROMPT, replace(GREEDY, logprobs=3))
        assert len(reply.logprobs[0]) == len(reply.tokens[0])
        for token_id, logprobs in zip(reply.tokens[0], reply.logprobs[0], strict=True):
            assert logprobs.top_token_ids[0] == token_id  # greedy
            assert logprobs.top_logprobs[0] == logprobs.chosen
            assert len(logprobs.top_token_ids) == 3
        assert all(sorted(logprobs.top_logprobs, reverse=True) == list(logprobs.top_logprobs) for logprobs in reply.logprobs[0])

    run(test)


def test_router_when_it_drains_refuses_what_is_new_and_finishes_what_it_has() -> None:
    async def main() -> None:
        async with Mesh("demo") as mesh:
            router = await mesh.router([await mesh.decode("d0")])
            sampling = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
            running = asyncio.ensure_future(mesh.generate(router, PROMPT, sampling))
            await mesh.wait_for(router, lambda status: status.output_tokens > 0)
            stopping = asyncio.ensure_future(mesh.stop(router))
            await asyncio.sleep(0.05)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await mesh.generate(router, PROMPT, GREEDY)
            error = status.from_rpc_error(refused.value, "router")
            assert isinstance(error, errors.Draining) and error.retry_after_s > 0
            assert len((await running).tokens[0]) == 300
            await stopping

    asyncio.run(main())


def test_status_while_a_request_runs_counts_its_tokens_and_its_first_one() -> None:
    async def test(small: Small) -> None:
        call = small.mesh.stub(small.router).Generate(
            inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text=PROMPT), sampling=convert.sampling_to_proto(LONG))
        )
        await call.read()
        seen = await small.mesh.wait_for(small.router, lambda status: status.output_tokens > 10)
        assert (seen.ttft.count, seen.in_flight, seen.finished) == (1, 1, 0)
        assert seen.prompt_tokens > 0 and seen.kv_bytes > 0
        call.cancel()

    run(test)


def test_worker_when_its_queue_is_full_says_so_to_the_client() -> None:
    """Not that no worker can be reached: that would send the client away for another reason, without the delay."""

    async def main() -> None:
        async with Mesh("demo", max_num_requests=1) as mesh:
            router = await mesh.router([await mesh.decode("d0")])
            call = mesh.stub(router).Generate(
                inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text=PROMPT), sampling=convert.sampling_to_proto(LONG))
            )
            await call.read()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await mesh.generate(router, PROMPT, GREEDY)
            assert isinstance(status.from_rpc_error(refused.value, "router"), errors.QueueFull)
            call.cancel()

    asyncio.run(main())


def test_prefill_worker_when_met_before_any_decode_worker_is_used_afterwards() -> None:
    async def main() -> None:
        async with Mesh("demo") as mesh:
            prefill, decode = await mesh.prefill("p0"), await mesh.decode("d0")
            router = await mesh.router([prefill, decode], max_local_tokens=0)
            await mesh.stop("d0")
            await mesh.stop("p0")
            await mesh.prefill("p0", address=prefill.rpartition("@")[2])
            await mesh.wait_for(router, lambda status: [w.state for w in status.workers if w.role == "prefill"] == ["up"])
            await mesh.decode("d0", address=decode.rpartition("@")[2])
            await mesh.wait_for(router, lambda status: all(worker.state == "up" for worker in status.workers))
            await asyncio.sleep(0.2)  # a report of each
            assert (await mesh.generate(router, PROMPT, GREEDY)).timing.prefill_worker_id == "p0"

    asyncio.run(main())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_worker_when_its_engine_dies_ends_so_that_it_is_started_again(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = False
    step = EngineCore.step

    def fail(core: EngineCore, *arguments: Any, **keywords: Any) -> Any:
        if broken:
            raise RuntimeError("out of memory")
        return step(core, *arguments, **keywords)

    monkeypatch.setattr(EngineCore, "step", fail)

    async def main() -> None:
        nonlocal broken
        async with Mesh("demo") as mesh:
            workers = [await mesh.decode("d0")] if role == "decode" else [await mesh.prefill("p0"), await mesh.decode("d0")]
            router = await mesh.router(workers, max_local_tokens=0)
            broken = True
            with contextlib.suppress(grpc.aio.AioRpcError):
                await mesh.generate(router, PROMPT, GREEDY)
            await asyncio.Event().wait()  # the worker's end ends the mesh of this test

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main()

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(bounded())
    assert caught.group_contains(errors.EngineStopped, match="the engine failed")


def test_prompt_logprobs_when_asked_for_come_first_and_bypass_caches_and_prefill_workers() -> None:
    async def test(small: Small) -> None:
        made = await small.mesh.generate(small.router, PROMPT, replace(GREEDY, logprobs=2))
        tokens = await small.mesh.stub(small.router).Tokenize(inference_pb2.TokenizeRequest(text=PROMPT))
        prompt = convert.unpack_u32(tokens.token_ids.packed)
        cached = [(await small.mesh.generate(small.router, [*prompt, *made.tokens[0]], GREEDY)).usage.cached_tokens for _ in range(2)]
        assert cached[1] > 0
        request = inference_pb2.GenerateRequest(
            prompt=inference_pb2.Prompt(token_ids=convert.token_ids_to_proto([*prompt, *made.tokens[0]])),
            sampling=convert.sampling_to_proto(SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=2, ignore_eos=True)),
            include_timing=True,
        )
        responses = [response async for response in small.mesh.stub(small.router).Generate(request)]
        scored = responses[0].prompt_logprobs
        assert [len(response.prompt_logprobs) for response in responses[1:]] == [0] * (len(responses) - 1)
        assert len(scored) == len(prompt) + len(made.tokens[0]) - 1
        for one, other in zip(scored[len(prompt) - 1 :], made.logprobs[0], strict=True):
            assert one.chosen == pytest.approx(other.chosen, abs=1e-4)
            assert one.top_token_ids[0] == other.top_token_ids[0]
        assert (responses[-1].usage.cached_tokens, responses[-1].timing.prefill_worker_id) == (0, "")

    run(test)


def test_slow_reader_when_too_much_waits_for_it_gives_its_place_and_its_blocks_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_session, "MAX_UNREAD_ARRIVALS", 100)

    async def test(small: Small) -> None:
        request = inference_pb2.GenerateRequest(
            prompt=inference_pb2.Prompt(text=PROMPT), sampling=convert.sampling_to_proto(replace(LONG, logprobs=20))
        )
        # A connection whose window does not grow: its buffers are full soon, and then the router's.
        async with grpc.aio.insecure_channel(small.narrow, options=[("grpc.http2.bdp_probe", 0)]) as channel:
            arrivals = aiter(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request))
            await anext(arrivals)
            await wait_until(lambda: is_served(small), timeout_s=20.0)
            await wait_until(lambda: owns_nothing(small), timeout_s=1.0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [response async for response in arrivals]
            assert isinstance(status.from_rpc_error(caught.value, "router"), errors.SlowReader)

    run(test)


async def is_served(small: Small) -> bool:
    """Whether the narrow router takes a request and finishes it."""
    try:
        return len((await small.mesh.generate(small.narrow, PROMPT, GREEDY)).tokens[0]) == 24
    except grpc.aio.AioRpcError as error:
        if isinstance(status.from_rpc_error(error, "router"), errors.QueueFull):
            return False
        raise


async def owns_nothing(small: Small) -> bool:
    return all(worker.load.blocks_owned == 0 for worker in (await small.mesh.status(small.router)).workers)


def test_router_when_it_falls_silent_with_its_session_open_is_cut_off_and_its_requests_are_freed() -> None:
    """Frozen, or behind a cable that was pulled: no end of the stream comes."""

    async def test(small: Small) -> None:
        [decode] = [worker for worker in (await small.mesh.status(small.router)).workers if worker.role == "decode"]
        call = decode_pb2_grpc.DecodeServiceStub(small.mesh.channel(decode.address)).Session()
        await call.write(decode_pb2.SessionCommand(hello=decode_pb2.SessionHello(router_id="frozen")))
        start = decode_pb2.Start(
            handle=0,
            request_id="a",
            token_ids=convert.token_ids_to_proto(range(300, 340)),
            sampling=convert.sampling_to_proto(replace(LONG, seed=1, max_tokens=4000)),
        )
        await call.write(decode_pb2.SessionCommand(start=start))
        began = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [frame async for frame in call]
        assert isinstance(status.from_rpc_error(caught.value, "decode"), errors.PeerUnavailable)
        assert SILENCE_S <= time.monotonic() - began < 5.0
        await wait_until(lambda: owns_nothing(small), timeout_s=1.0)

    run(test)
