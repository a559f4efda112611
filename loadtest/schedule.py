"""What a load test sends and when, fixed before the first request leaves: the same file drives a cluster, another client, or the simulator.

A prompt is a chain of content blocks: each block has an id, and equal leading ids mean an equal prefix, as in Mooncake's traces. Ids are
kept as runs of consecutive numbers, since a conversation of 100,000 tokens is a few runs and a thousand ids. What tokens an id stands for
is prompts.py's affair; who sends them, run's.

A request either has its time from the start of the run, or comes `think_s` after another one has been answered: a session's next turn.
"""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import msgspec

from loadtest.files import BadInput, open_text, read_rows

FORMAT = "baton.schedule/1"


class PlannedRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """
    at_s            from the start of the run; of a later turn of a session: 0, `after` and `think_s` say when
    input_tokens    of the prompt; its last block may be partly filled
    block_runs      the prompt's blocks, ceil(input_tokens / block_size) of them, as (first id, number of ids)
    after           index in the schedule of the request, an earlier one, whose answer this one waits for
    think_s         between that answer's end and this request
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    block_runs: tuple[tuple[int, int], ...] = ()
    session: str = ""
    after: int | None = None
    think_s: float = 0.0

    def block_ids(self) -> list[int]:
        """All of the prompt's block ids, in order."""
        return [block_id for first, count in self.block_runs for block_id in range(first, first + count)]


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    format: str
    block_size: int
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

        Raises BadInput when blocks cannot be divided so.
        """
        if divisor < 1 or self.block_size % divisor:
            raise BadInput(f"the lengths cannot be divided by {divisor}: blocks have {self.block_size} tokens")
        requests = tuple(
            msgspec.structs.replace(
                request, input_tokens=-(-request.input_tokens // divisor), output_tokens=-(-request.output_tokens // divisor)
            )
            for request in self.requests
        )
        smaller = self._with(requests, f"lengths / {divisor}")
        smaller.block_size = self.block_size // divisor
        return smaller

    def fitting(self, max_model_len: int) -> "Schedule":
        """Only requests that a model of this context takes; of a session only the turns before the first that it does not."""
        return self._filter(
            lambda request, _: request.input_tokens + request.output_tokens <= max_model_len, f"at most {max_model_len} tokens"
        )

    def first(self, *, seconds: float | None = None, num_requests: int | None = None) -> "Schedule":
        """The beginning, up to a time or a number of requests; later turns count with the first of their session."""

        def is_early(request: PlannedRequest, index: int) -> bool:
            if num_requests is not None and index >= num_requests:
                return False
            return seconds is None or request.after is not None or request.at_s < seconds

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
            requests = tuple(read_rows(file, PlannedRequest, path, first_line=2))
        schedule = cls(block_size=header.block_size, requests=requests, source=header.source, seed=header.seed)
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
