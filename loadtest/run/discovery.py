"""What a target is and what it can take: asked once before a run. A Baton says all of it; another server what /v1/models says."""

import asyncio
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import grpc

from loadtest.files import BadInput
from loadtest.run.job import Target
from protos.baton.v1 import inference_pb2, inference_pb2_grpc
from services.mesh.client import is_address, open_channel

TIMEOUT_S = 10.0
# Of servers that do not say how large their vocabulary is: ids that nearly all have, above those that tend to be special.
DEFAULT_VOCAB_SIZE, FIRST_TOKEN = 4096, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """
    router                    Baton's gRPC address, for what only it can tell; None: there is none
    max_model_len             None: it does not say
    block_size, block_bytes   of a KV block; None: it does not say
    """

    target: Target
    router: str | None
    max_model_len: int | None
    block_size: int | None = None
    block_bytes: int | None = None


async def discover(
    url: str, *, model: str, endpoint: str, vocab_size: int | None, headers: dict[str, str], router: str | None = None
) -> Server:
    """Asks the target. Raises BadInput when the URL is none, nobody answers, or it does not serve the model."""
    parts = urlsplit(url if "://" in url else f"grpc://{url}")
    if parts.scheme == "grpc":
        if not is_address(parts.netloc):
            raise BadInput(f"--target: {url!r} is not grpc://host:port")
        return await _ask_baton(parts.netloc, model, vocab_size)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"--target: {url!r} is neither grpc://host:port nor http(s)://host[:port]/v1")
    base = url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
    listed = await asyncio.to_thread(_get_json, f"{base}/models", headers)
    models: list[dict[str, Any]] = listed.get("data") or []
    served = next((one for one in models if model in ("", one.get("id"))), None)
    if served is None:
        raise BadInput(f"{base}: it does not serve {model!r}, but {', '.join(str(one.get('id')) for one in models) or 'nothing'}")
    is_baton = served.get("owned_by") == "baton"
    inside = await _ask_baton(router, str(served["id"]), vocab_size) if router else None
    return Server(
        target=Target(
            url=base,
            model=str(served["id"]),
            endpoint=endpoint,
            first_token=FIRST_TOKEN,
            vocab_size=inside.target.vocab_size if inside else vocab_size or DEFAULT_VOCAB_SIZE,
            is_baton=is_baton,
            headers=headers,
        ),
        router=router,
        max_model_len=served.get("max_model_len"),
        block_size=inside.block_size if inside else None,
        block_bytes=inside.block_bytes if inside else None,
    )


async def _ask_baton(router: str, model: str, vocab_size: int | None) -> Server:
    async with open_channel(router) as channel:
        try:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            listed = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=TIMEOUT_S, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            raise BadInput(f"{router}: no router answers there ({error.code().name}); `baton up` starts one") from None
    served = next((one for one in listed.models if model in ("", one.name)), None)
    if served is None:
        raise BadInput(f"{router}: it does not serve {model!r}, but {', '.join(one.name for one in listed.models) or 'nothing'}")
    first = min(FIRST_TOKEN, served.vocab_size // 2)
    return Server(
        target=Target(
            url=f"grpc://{router}", model=served.name, first_token=first, vocab_size=vocab_size or served.vocab_size, is_baton=True
        ),
        router=router,
        max_model_len=served.max_model_len,
        block_size=served.block_size or None,
        block_bytes=served.block_bytes or None,
    )


def _get_json(url: str, headers: dict[str, str]) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as response:
            answer = json.load(response)
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise BadInput(f"{url}: {getattr(error, 'reason', error)}") from None
    if not isinstance(answer, dict):
        raise BadInput(f"{url}: no list of models")
    return answer
