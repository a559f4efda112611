"""An OpenAI-compatible server of fixed latency, as a process of its own: what a client reports of it is known beforehand.

    python -m tests.stub_server PORT TTFT_MS ITL_MS

Each request gets its first token TTFT_MS after its head was read and one more each ITL_MS, all timed from the first: no error adds up.
Prompts and answers are counted in token ids, or in words where the prompt is a text. It computes nothing, so it never queues.
/v1/asked is the number of requests so far, for who wants to do something in the middle of a run.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "stub"


def make_app(ttft_s: float, itl_s: float) -> Starlette:
    num_asked = 0

    async def asked(_: Request) -> Response:
        return JSONResponse(num_asked)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "nobody", "max_model_len": 1 << 20}]})

    async def complete(request: Request) -> Response:
        nonlocal num_asked
        num_asked += 1
        began_s = time.monotonic()
        body = await request.json()
        is_chat = "messages" in body
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        prompt_tokens = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        num_tokens = body.get("max_completion_tokens") or body["max_tokens"]
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens, "total_tokens": prompt_tokens + num_tokens}
        head = {"id": "stub", "object": "chat.completion.chunk" if is_chat else "text_completion", "created": 0, "model": MODEL}

        async def events() -> AsyncIterator[bytes]:
            for token in range(num_tokens):
                await asyncio.sleep(began_s + ttft_s + token * itl_s - time.monotonic())
                text = f" t{token}"
                reason = "length" if token == num_tokens - 1 else None
                piece: dict[str, Any] = {"delta": {"content": text}} if is_chat else {"text": text}
                yield _event({**head, "choices": [{"index": 0, **piece, "finish_reason": reason}]})
            yield _event({**head, "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/asked", asked),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", complete, methods=["POST"]),
        ]
    )


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


if __name__ == "__main__":
    port, ttft_ms, itl_ms = sys.argv[1:]
    uvicorn.run(make_app(float(ttft_ms) / 1e3, float(itl_ms) / 1e3), host="127.0.0.1", port=int(port), log_level="warning")
