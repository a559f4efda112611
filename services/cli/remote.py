"""Runs `baton generate` on a mesh: one call to a router over gRPC, its text on the terminal as it comes, and who did it at the end."""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import grpc
import typer
from rich.console import Console

from protos.baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from services.cli.printer import ChoicePrinter, Speed
from services.cli.sampling import SamplingOptions, default_max_tokens
from services.cli.timeline import timeline, totals
from services.core.errors import BatonError, InvalidRequest, PeerUnavailable, UnknownModel
from services.core.prefix_hash import TOKEN_BYTES
from services.mesh import convert, status
from services.mesh.client import is_address, open_channel

DEFAULT_ROUTER = "127.0.0.1:50051"
Router = Annotated[str, typer.Option("--router", envvar="BATON_ROUTER", help="Where a router listens, host:port.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What the last response of a call tells."""

    usage: inference_pb2.Usage
    timing: inference_pb2.RequestTiming


class RouterClient:
    """A channel to one router. Its calls raise the tree's errors; InvalidRequest at once for an address that is none."""

    def __init__(self, router: str) -> None:
        check_address(router)
        self._router = router

    async def __aenter__(self) -> "RouterClient":
        self._channel = open_channel(self._router)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.close()

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None, show: Callable[[inference_pb2.GenerateResponse], None]
    ) -> Ended:
        """Shows each response as it comes. Cancelling ends the work for it everywhere."""
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            response = None
            async for response in call:
                show(response)
        except grpc.aio.AioRpcError as error:
            raise explain(error, self._router) from error
        finally:
            call.cancel()
        if response is None or not response.HasField("usage"):
            raise PeerUnavailable(f"{self._router}: the stream ended before the request did")
        return Ended(usage=response.usage, timing=response.timing)

    async def room(self, model: str, prompt: inference_pb2.Prompt, *, timeout_s: float | None) -> int:
        """How many tokens the model's context leaves after the prompt."""
        try:
            if prompt.WhichOneof("kind") == "token_ids":
                listed: inference_pb2.ListModelsResponse = await self._stub.ListModels(inference_pb2.ListModelsRequest(), timeout=timeout_s)
                served = next((candidate for candidate in listed.models if model in ("", candidate.name)), None)
                if served is None:
                    names = ", ".join(candidate.name for candidate in listed.models)
                    raise UnknownModel(f"{self._router}: model {model!r} is not served there; {names or 'none'} is")
                return served.max_model_len - len(prompt.token_ids.packed) // TOKEN_BYTES
            request = inference_pb2.TokenizeRequest(model=model)
            if prompt.WhichOneof("kind") == "chat":
                request.chat.CopyFrom(prompt.chat)
            else:
                request.text = prompt.text
            response: inference_pb2.TokenizeResponse = await self._stub.Tokenize(request, timeout=timeout_s)
            return response.max_model_len - len(response.token_ids.packed) // TOKEN_BYTES
        except grpc.aio.AioRpcError as error:
            raise explain(error, self._router) from error


def check_address(router: str) -> None:
    """Raises InvalidRequest naming `--router` unless it is host:port."""
    if not is_address(router):
        raise InvalidRequest("--router", f"{router!r} is not host:port")


def explain(error: grpc.aio.AioRpcError, router: str) -> BatonError:
    """The error of a call to a router; where nothing listens, with the advice that helps most often."""
    known = status.from_rpc_error(error, router)
    details = error.details() or ""
    if error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
        return PeerUnavailable(f"{router}: {details.rpartition(': ')[2]}: no router answers there; `baton up` starts one")
    return known


def make_prompt(*, text: str | None, token_ids: list[int] | None, chat: bool) -> inference_pb2.Prompt:
    """A text, as a user's message if `chat`, else token ids. Raises InvalidRequest for an id that can be none."""
    if text is not None and chat:
        return inference_pb2.Prompt(chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content=text)]))
    if text is not None:
        return inference_pb2.Prompt(text=text)
    try:
        return inference_pb2.Prompt(token_ids=convert.token_ids_to_proto(token_ids or ()))
    except OverflowError:
        raise InvalidRequest("prompt", "a token id is outside [0, 4294967295]", limit=(1 << 32) - 1) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteGeneration:
    """One request and how it is shown; `timeout_s` None: no deadline."""

    router: str
    model: str
    prompt: inference_pb2.Prompt
    options: SamplingOptions
    stop: tuple[str, ...]
    cache_salt: str
    timeout_s: float | None
    with_timeline: bool

    async def run(self) -> None:
        """Streams the text to stdout, then tells seed, speed and path on stderr. Raises what the mesh raises."""
        sampling = self.options.to_proto()
        async with RouterClient(self.router) as client:
            if not sampling.HasField("max_tokens"):
                sampling.max_tokens = default_max_tokens(await client.room(self.model, self.prompt, timeout_s=self.timeout_s))
            request = inference_pb2.GenerateRequest(
                model=self.model,
                prompt=self.prompt,
                sampling=sampling,
                stop=self.stop,
                cache_salt=self.cache_salt,
                include_timing=True,
            )
            await show_generation(client, request, timeout_s=self.timeout_s, with_timeline=self.with_timeline)


async def show_generation(
    client: RouterClient, request: inference_pb2.GenerateRequest, *, timeout_s: float | None, with_timeline: bool
) -> Ended:
    """Streams one request to the terminal: text to stdout, the rest to stderr."""
    num_choices = max(1, request.sampling.n)
    printer, speed = ChoicePrinter(num_choices), Speed()
    ended: Ended | None = None

    def show(response: inference_pb2.GenerateResponse) -> None:
        if response.token_ids.packed or response.finish_reason:
            speed.saw(len(response.token_ids.packed) // TOKEN_BYTES)
        printer.show(response.choice, response.text, _finish_word(response.finish_reason))

    try:
        ended = await client.generate(request, timeout_s=timeout_s, show=show)
        return ended
    finally:
        # On Ctrl-C too: whoever interrupts wants to know what was made so far.
        if speed.has_begun:
            printer.close()
            path = "" if ended is None else f", {totals(ended.timing, ended.usage)}, seed {ended.timing.seed}"
            print(f"[{speed.summary()}{path}]", file=sys.stderr)
        if ended is not None and with_timeline:
            console = Console(stderr=True, highlight=False)
            for line in timeline(ended.timing, ended.usage, num_choices=num_choices):
                console.print(line, no_wrap=True, crop=False)


def run_remote(generation: RemoteGeneration) -> None:
    """Returns when all choices have ended."""
    asyncio.run(generation.run())


def _finish_word(reason: common_pb2.FinishReason) -> str | None:
    return common_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower() if reason else None
