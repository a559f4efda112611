"""OpenAI's own client against a mesh on the demo model: what it gets, what it raises, what is freed when it leaves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from services.core.types import SamplingParams
from tests.mesh import Mesh
from tests.waiting import wait_until

PROMPT = "def read_json(path):\n    "
HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
CHAT = "# system: Be brief.\n# user: hello\n# assistant:"


@dataclass(frozen=True, slots=True)
class Small:
    """One prefill and one decode worker; `narrow` is a client of a router that takes one request at a time."""

    mesh: Mesh
    router: str
    client: openai.AsyncOpenAI
    narrow: openai.AsyncOpenAI

    async def loads(self) -> None:
        """Until nothing runs and no block is owned."""
        await self.mesh.loads(self.router)


def client_of(mesh: Mesh, router: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://{mesh.http_address(router)}/v1", api_key="none", max_retries=0)


@contextlib.asynccontextmanager
async def small_mesh() -> AsyncIterator[Small]:
    async with Mesh("demo") as mesh:
        workers = [await mesh.prefill("p0"), await mesh.decode("d0")]
        router = await mesh.router(workers, http=True)
        narrow = await mesh.router(workers, http=True, max_in_flight=1)
        async with client_of(mesh, router) as client, client_of(mesh, narrow) as narrow_client:
            yield Small(mesh, router, client, narrow_client)


def run(test: Callable[[Small], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with small_mesh() as small:
            await test(small)
            await small.loads()

    asyncio.run(main())


def test_completions_when_whole_or_streamed_have_the_text_of_the_grpc_call() -> None:
    async def test(small: Small) -> None:
        asked: Any = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": 5, "n": 3}
        sampling = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=5, n=3)
        texts = (await small.mesh.generate(small.router, PROMPT, sampling)).texts
        whole = await small.client.completions.create(**asked)
        assert [choice.text for choice in whole.choices] == texts
        streamed = [""] * 3
        async for chunk in await small.client.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.text
        assert streamed == texts
        assert whole.usage is not None and whole.usage.completion_tokens <= 72
        assert whole.usage.prompt_tokens_details is not None
        # The second call found its prompt's full blocks; so many tokens are one block here.
        ids = await small.client.completions.create(**asked | {"prompt": [300] * 20})
        again = await small.client.completions.create(**asked | {"prompt": [300] * 20})
        assert ids.usage is not None and ids.usage.prompt_tokens == 20
        assert again.usage is not None and again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens == 16

    run(test)


def test_completions_when_batched_are_those_of_each_prompt() -> None:
    async def test(small: Small) -> None:
        prompts = [PROMPT, "import os\n", "class Store:\n"]
        asked: Any = {"model": "demo", "max_tokens": 12, "temperature": 0.7, "seed": 1, "stop": ["\n\n"]}
        batch = await small.client.completions.create(prompt=prompts, **asked)
        alone = [(await small.client.completions.create(prompt=prompt, **asked)).choices[0].text for prompt in prompts]
        assert [choice.text for choice in batch.choices] == alone
        assert [choice.index for choice in batch.choices] == [0, 1, 2]

    run(test)


def test_chats_when_whole_or_streamed_have_the_text_that_their_template_asks_for() -> None:
    async def test(small: Small) -> None:
        sampling = SamplingParams(max_tokens=12, temperature=0.0, logprobs=3)
        reference = await small.mesh.generate(small.router, CHAT, sampling)
        asked: Any = {"model": "demo", "messages": HELLO, "max_completion_tokens": 12, "temperature": 0.0}
        whole = await small.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
        [choice] = whole.choices
        assert (choice.message.role, choice.message.content) == ("assistant", reference.texts[0])
        assert choice.logprobs is not None and choice.logprobs.content is not None
        logprobs = [entry.chosen for entry in reference.logprobs[0]]
        assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(logprobs, abs=1e-4)
        assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)
        text = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content).decode()
        assert text.startswith(reference.texts[0])
        streamed, usage = "", None
        async for chunk in await small.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            streamed += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        assert streamed == reference.texts[0]
        assert usage is not None and usage.prompt_tokens == reference.usage.prompt_tokens

    run(test)


def test_sync_client_when_used_from_a_thread_lists_models_and_completes() -> None:
    async def test(small: Small) -> None:
        def ask() -> str:
            with openai.OpenAI(base_url=str(small.client.base_url), api_key="none", max_retries=0) as client:
                [model] = client.models.list()
                assert client.models.retrieve(model.id).id == "demo"
                stream = client.completions.create(model=model.id, prompt=PROMPT, max_tokens=8, temperature=0, stream=True)
                return "".join(chunk.choices[0].text for chunk in stream)

        reference = await small.mesh.generate(small.router, PROMPT, SamplingParams(max_tokens=8, temperature=0.0))
        assert await asyncio.to_thread(ask) == reference.texts[0]

    run(test)


def test_errors_when_requests_are_wrong_are_those_of_the_client() -> None:
    async def test(small: Small) -> None:
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("temperature", {"temperature": -1.0}),
            ("max_tokens", {"max_tokens": 5000}),
            ("max_tokens", {"max_tokens": 0}),
            ("prompt", {"prompt": ""}),
            ("prompt", {"prompt": [5] * 4096}),
            ("prompt", {"prompt": "x " * 1_000_000}),
            ("prompt", {"prompt": [4096]}),
            ("n", {"n": 129}),
            ("stop", {"stop": ["x"] * 17}),
            ("logit_bias", {"logit_bias": {"5000": 1.0}}),
        ]
        for field, fields in wrong:
            with pytest.raises(openai.BadRequestError) as refusal:
                await small.client.completions.create(**{"model": "demo", "prompt": PROMPT} | fields)
            assert (refusal.value.param, refusal.value.type) == (field, "invalid_request_error"), fields
        with pytest.raises(openai.NotFoundError) as missing:
            await small.client.completions.create(model="other", prompt=PROMPT)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            await small.client.embeddings.create(model="demo", input="x")

    run(test)


def test_request_when_too_many_are_in_flight_is_refused_with_a_delay() -> None:
    async def test(small: Small) -> None:
        stream = await small.narrow.completions.create(
            model="demo", prompt=PROMPT, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(openai.RateLimitError) as refusal:
            await small.narrow.completions.create(model="demo", prompt=PROMPT)
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        assert refusal.value.code == "queue_full"
        await stream.close()

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_client_when_it_leaves_frees_the_workers_within_a_second(stream: bool) -> None:
    async def test(small: Small) -> None:
        async def ask() -> None:
            asked: Any = {"model": "demo", "prompt": PROMPT, "max_tokens": 3000, "stream": stream}
            answer = await small.client.completions.create(**asked, extra_body={"ignore_eos": True})
            if stream:
                async for _ in answer:
                    pass

        async def is_running() -> bool:
            return any(worker.load.num_running for worker in (await small.mesh.status(small.router)).workers)

        task = asyncio.create_task(ask())
        await wait_until(is_running)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

        async def is_idle() -> bool:
            return not await is_running()

        # A second for the cancel, and half a one until the worker's next report.
        assert await wait_until(is_idle) < 1.6

    run(test)


def test_deadline_when_it_passes_is_an_error_and_frees_the_workers() -> None:
    async def test(small: Small) -> None:
        with pytest.raises(openai.InternalServerError) as late:
            await small.client.completions.create(
                model="demo", prompt=PROMPT, max_tokens=3000, extra_body={"ignore_eos": True}, extra_headers={"x-request-timeout": "0.5"}
            )
        assert late.value.status_code == 504 and late.value.code == "deadline_exceeded"

    run(test)


def test_router_when_it_drains_refuses_new_requests_and_finishes_open_ones() -> None:
    async def main() -> None:
        async with Mesh("demo") as mesh:
            router = await mesh.router([await mesh.decode("d0")], http=True)
            async with client_of(mesh, router) as client:
                asked: Any = {"model": "demo", "prompt": PROMPT, "max_tokens": 200, "temperature": 0}
                stream = await client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
                stopping = asyncio.create_task(mesh.stop(router))
                await asyncio.sleep(0.05)
                with pytest.raises(openai.InternalServerError) as refusal:
                    await client.completions.create(**asked)
                assert (refusal.value.status_code, refusal.value.code) == (503, "draining")
                assert int(refusal.value.response.headers["retry-after"]) >= 1
                reasons = [chunk.choices[0].finish_reason async for chunk in stream]
                assert reasons[-1] == "length"
                await stopping

    asyncio.run(main())
