"""What a client notes of one request: when it was sent, when which tokens came, how it ended. Nothing is judged here.

Times are time.monotonic()'s: one clock for all processes of a machine.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(slots=True)
class Answer:
    """
    sent_s, finished_s   of the call; token_times: (time, tokens that came) of each chunk that brought any
    digest               of what was answered: token ids where the server sends them, else text
    input_tokens         as the server counted the prompt; cached_tokens likewise, None when it did not say
    is_refused           shed, to be sent again later
    timing               where its time went, as a Baton says it: fields of RequestTiming
    """

    sent_s: float = 0.0
    finished_s: float = 0.0
    token_times: list[tuple[float, int]] = field(default_factory=list)
    output_tokens: int = 0
    input_tokens: int | None = None
    cached_tokens: int | None = None
    error: str = ""
    is_refused: bool = False
    retry_after_s: float | None = None
    is_complete: bool = False
    timing: Any = None
    content: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    @property
    def digest(self) -> str:
        return str(self.content.hexdigest()) if self.token_times else ""


class Client(Protocol):
    """Sends requests to one target, as many at once as it is asked to."""

    async def send(self, payload: bytes, answer: Answer, timeout_s: float) -> None:
        """One request to its end, which `answer` is told piece by piece: a request that is cut off has told what came. Never raises for
        what the server or the network does: that is an answer too."""
        ...

    async def close(self) -> None: ...
