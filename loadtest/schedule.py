"""What a load test sends and when, fixed before the first request leaves: the same file drives a cluster, another client, or the simulator.

A prompt is a chain of content blocks: each block has an id, and equal leading ids mean an equal prefix, as in Mooncake's traces. Ids are
kept as runs of consecutive numbers, since a conversation of 100,000 tokens is a few runs and a thousand ids. What tokens an id stands for
is prompts.py's affair; who sends them, run's. A prompt may instead be a real text: it has no blocks then.

A request either has its time from the start of the run, or comes `think_s` after another one has been answered: a session's next turn.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

import msgspec

from loadtest.files import BadInput, open_text, read_numbered_rows, read_rows

FORMAT = "baton.schedule/1"

# What a file may hold; the upper end of times keeps infinity out.
Tokens = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
BlockId = Annotated[int, msgspec.Meta(ge=0)]


class PlannedRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """
    at_s            from the start of the run; of a later turn of a session: 0, `after` and `think_s` say when
    input_tokens    of the prompt; its last block may be partly filled. Of a text: what its file says, or an estimate (traces/text.py)
    block_runs      the prompt's blocks, ceil(input_tokens / block_size) of them, as (first id, number of ids); none of a text
    after           index in the schedule of the request, an earlier one, whose answer this one waits for
    think_s         between that answer's end and this request
    tenant          whose request it is; empty where nobody asks
    text            the prompt itself, where it is a real one
    """

    at_s: Seconds
    input_tokens: Tokens
    output_tokens: Tokens
    block_runs: tuple[tuple[BlockId, Tokens], ...] = ()
    session: str = ""
    after: Annotated[int, msgspec.Meta(ge=0)] | None = None
    think_s: Seconds = 0.0
    tenant: str = ""
    text: str = ""

    def block_ids(self) -> list[int]:
        """All of the prompt's block ids, in order."""
        return [block_id for first, count in self.block_runs for block_id in range(first, first + count)]


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    format: str
    block_size: Tokens
    source: str
    seed: int
    digest: str


class Schedule:
    """Requests, those with a time of their own in its order.

    block_size   tokens of a content block
    source       where it comes from and what was done to it, for people
    seed         of everything random in it
    """

    def __init__(self, *, block_size: int, requests: tuple[PlannedRequest, ...], source: str, seed: int = 0) -> None:
        self.block_size = block_size
        self.requests = requests
        self.source = source
        self.seed = seed

    def __len__(self) -> int:
        return len(self.requests)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of everything that decides what is sent and when: two runs with equal digests were asked for the same."""
        digest = hashlib.sha256(f"{FORMAT} {self.block_size}\n".encode())
        for request in self.requests:
            digest.update(msgspec.json.encode(request) + b"\n")
        return digest.hexdigest()

    @cached_property
    def earliest_s(self) -> Sequence[float]:
        """When each request would come if every answer took no time at all."""
        times: list[float] = []
        for request in self.requests:
            times.append(request.at_s if request.after is None else times[request.after] + request.think_s)
        return times

    def with_times(self, times_s: Sequence[float], note: str) -> "Schedule":
        """The requests that have a time of their own come at these instead, in the same order; the others follow them as before.

        times_s   as many as there are such requests, none before the one ahead of it
        """
        times = iter(times_s)
        return self._with(
            tuple(msgspec.structs.replace(request, at_s=next(times)) if request.after is None else request for request in self.requests),
            note,
        )

    def with_speedup(self, factor: float) -> "Schedule":
        """Everything, think times too, `factor` times as fast."""
        if factor == 1.0:
            return self
        requests = tuple(
            msgspec.structs.replace(request, at_s=request.at_s / factor, think_s=request.think_s / factor) for request in self.requests
        )
        return self._with(requests, f"{factor:g} times as fast")

    def repeated(self, num_copies: int) -> "Schedule":
        """So many copies at the same time that share nothing: each has blocks of its own."""
        if num_copies == 1:
            return self
        stride = 1 + max((first + count for request in self.requests for first, count in request.block_runs), default=0)
        requests = tuple(
            msgspec.structs.replace(
                request,
                block_runs=tuple((first + copy * stride, count) for first, count in request.block_runs),
                session=f"{request.session}/{copy}" if request.session else "",
                after=None if request.after is None else request.after * num_copies + copy,
            )
            for request in self.requests
            for copy in range(num_copies)
        )
        return self._with(requests, f"{num_copies} copies")

    def shrunk(self, divisor: int) -> "Schedule":
        """All lengths divided, for small models. Blocks keep their ids, so that every shared prefix stays shared.

        A last block that was partly filled stays so, since only full blocks are reused: its length is rounded up, but not to a whole
        block. With one token a block there is no such length, and it becomes full.
        Raises BadInput when blocks cannot be divided so, or prompts are texts.
        """
        if divisor == 1:
            return self
        if divisor < 1 or self.block_size % divisor:
            raise BadInput(f"the lengths cannot be divided by {divisor}: blocks have {self.block_size} tokens")
        if any(request.text for request in self.requests):
            raise BadInput("the lengths of texts cannot be divided")
        block_size = self.block_size // divisor

        def divided(input_tokens: int) -> int:
            full, rest = divmod(input_tokens, self.block_size)
            return full * block_size + (max(1, min(-(-rest // divisor), block_size - 1)) if rest else 0)

        requests = tuple(
            msgspec.structs.replace(request, input_tokens=divided(request.input_tokens), output_tokens=-(-request.output_tokens // divisor))
            for request in self.requests
        )
        smaller = self._with(requests, f"lengths / {divisor}")
        smaller.block_size = block_size
        return smaller

    def fitting(self, max_model_len: int) -> "Schedule":
        """Only requests that a model of this context takes; of a session only the turns before the first that it does not."""
        return self._filter(
            lambda request, _: request.input_tokens + request.output_tokens <= max_model_len, f"at most {max_model_len} tokens"
        )

    def first(self, *, seconds: float | None = None, num_requests: int | None = None) -> "Schedule":
        """The beginning, up to a time or a number of requests; a later turn has the time at which it would come at the earliest."""
        if seconds is None and num_requests is None:
            return self
        earliest_s = iter(self.earliest_s)

        def is_early(_: PlannedRequest, num_kept: int) -> bool:
            at_s = next(earliest_s)
            return (num_requests is None or num_kept < num_requests) and (seconds is None or at_s < seconds)

        limits = [f"{limit:g} {unit}" for limit, unit in ((seconds, "s"), (num_requests, "requests")) if limit is not None]
        return self._filter(is_early, f"the first {', '.join(limits)}")

    def save(self, path: Path) -> None:
        """Writes JSON lines, compressed when the name ends in .gz: one about the schedule, one for each request."""
        header = _Header(format=FORMAT, block_size=self.block_size, source=self.source, seed=self.seed, digest=self.digest)
        with open_text(path, "w") as file:
            for row in (header, *self.requests):
                file.write(msgspec.json.encode(row).decode() + "\n")

    @classmethod
    def load(cls, path: Path) -> "Schedule":
        """Reads what save() wrote. Raises BadInput for anything else, or when the contents are not those of the digest."""
        with open_text(path, "r") as file:
            header = next(read_rows(file, _Header, path), None)
            if header is None or header.format != FORMAT:
                raise BadInput(f"{path} is no schedule of format {FORMAT}")
            requests: list[PlannedRequest] = []
            for number, request in read_numbered_rows(file, PlannedRequest, path, first_line=2):
                if problem := _problem(request, len(requests), header.block_size):
                    raise BadInput(f"{path}, line {number}: {problem}")
                requests.append(request)
        schedule = cls(block_size=header.block_size, requests=tuple(requests), source=header.source, seed=header.seed)
        if schedule.digest != header.digest:
            raise BadInput(f"{path} was changed or cut off: its requests do not match its digest")
        return schedule

    def _filter(self, keep: Callable[[PlannedRequest, int], bool], limit: str) -> "Schedule":
        kept: dict[int, int] = {}  # old index → new
        requests: list[PlannedRequest] = []
        for index, request in enumerate(self.requests):
            if not keep(request, len(requests)) or (request.after is not None and request.after not in kept):
                continue
            kept[index] = len(requests)
            requests.append(request if request.after is None else msgspec.structs.replace(request, after=kept[request.after]))
        dropped = len(self.requests) - len(requests)
        return self._with(tuple(requests), f"{limit}: {dropped} requests left out") if dropped else self

    def _with(self, requests: tuple[PlannedRequest, ...], note: str) -> "Schedule":
        return Schedule(block_size=self.block_size, requests=requests, source=f"{self.source}; {note}", seed=self.seed)


def _problem(request: PlannedRequest, index: int, block_size: int) -> str | None:
    """What is wrong with a request at this place of a file, beyond its types."""
    if request.after is not None and request.after >= index:
        return f"after is {request.after}, no earlier request"
    num_blocks = sum(count for _, count in request.block_runs)
    expected = 0 if request.text else -(-request.input_tokens // block_size)
    if num_blocks != expected:
        return f"block_runs has {num_blocks} blocks, {expected} of {block_size} tokens belong to it"
    return None
