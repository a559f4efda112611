"""A client of /v1/completions that costs little beside what it measures: bare sockets, streams read line by line, times noted.

Works with any server that speaks OpenAI's protocol over HTTP/1.1. Knows nothing of loads or figures.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PATH = "/v1/completions"


@dataclass(slots=True)
class Reply:
    """What came of a request: times are seconds since it was sent.

    status         of HTTP; error: what the server said when it was not 200, or in the middle of a stream
    token_times    of each event with text or tokens; the first one is the TTFT
    tokens         completion tokens, as the server counts them
    """

    status: int = 0
    error: str = ""
    retry_after_s: float | None = None
    token_times: list[float] = field(default_factory=list)
    tokens: int = 0
    total_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] if self.token_times else float("inf")

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def tpot_s(self) -> float:
        return (self.token_times[-1] - self.token_times[0]) / max(1, self.tokens - 1) if self.token_times else float("inf")


def request_body(prompt: Sequence[int], max_tokens: int, *, model: str, stream: bool = True) -> bytes:
    body: dict[str, Any] = {"model": model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()


async def complete(address: str, body: bytes) -> Reply:
    """One request over a connection of its own, to its end."""
    host, _, port = address.rpartition(":")
    reply = Reply()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    try:
        fields = f"host: {address}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        writer.write(f"POST {PATH} HTTP/1.1\r\n{fields}\r\n".encode() + body)
        reply.status = int((await reader.readline()).split()[1])
        while (line := await reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            if name.lower() == "retry-after":
                reply.retry_after_s = float(value)
        if reply.status != 200:
            reply.error = (await reader.read()).decode(errors="replace")
            return reply
        async for line in reader:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                _take(reply, json.loads(line[6:]), time.perf_counter() - started)
            elif line.startswith(b"{"):
                answer = json.loads(line)
                reply.tokens = answer["usage"]["completion_tokens"]
    finally:
        writer.close()
        reply.total_s = time.perf_counter() - started
    return reply


def _take(reply: Reply, event: dict[str, Any], at_s: float) -> None:
    if "error" in event:
        reply.error = json.dumps(event["error"])
    if event.get("usage"):
        reply.tokens = event["usage"]["completion_tokens"]
    if event.get("choices"):
        reply.token_times.append(at_s)
