"""What became of each request, whoever sent it: the same record from a run on a cluster, from the simulator, from other tools' files.

Times are seconds from the start of the run on the sender's clock, None where a request did not come so far. Every latency counts from
`at_s`, when the schedule wanted the request sent, not from when it was: a sender that cannot keep up hides nothing.
"""

import enum
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from loadtest.files import BadInput, open_text, read_rows


class Outcome(enum.StrEnum):
    """How a request ended."""

    COMPLETED = "completed"  # with all that it was to bring
    REFUSED = "refused"  # shed with a retry delay, before it began
    FAILED = "failed"  # anything else: an error, too few tokens, no end
    UNSENT = "unsent"  # it never left; its run is invalid


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """What a request has to keep to be good: the first token within ttft_s + input_tokens × ttft_per_token_s, the others at tpot_s."""

    ttft_s: float = 1.0
    ttft_per_token_s: float = 0.0
    tpot_s: float = 0.1

    def first_token_within_s(self, input_tokens: int) -> float:
        return self.ttft_s + input_tokens * self.ttft_per_token_s


class RequestRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """
    index              in the schedule
    at_s, sent_s       intended, real; of a session's later turn the intended time is its predecessor's end plus the think time
    input_tokens       as the server counted them, or as planned when it did not say
    planned_tokens     output tokens that were asked for
    output_tokens      that came
    first_token_s      when the first one came; last_token_s: the last one
    finished_s         when the answer ended, however it did
    gaps_s             between chunks that brought tokens, one for each but the first
    first_tokens       tokens in the first chunk: a server may send several at once
    cached_tokens      of the prompt, as the server counted them; None: it did not say
    prefill_cached_tokens, decode_cached_tokens   by where they lay
    error              its name and text
    answer_digest      of the output tokens (of the text, where a server sends no tokens): equal answers have equal digests
    stages             seconds of each stage in order, of loadtest.stages; empty when the server tells none
    attempts           on decode workers; prefill_attempts: prefill workers that were asked; steps: of engines that brought tokens
    """

    index: int
    at_s: float
    sent_s: float | None = None
    session: str = ""
    tenant: str = ""
    input_tokens: int = 0
    planned_tokens: int = 0
    output_tokens: int = 0
    outcome: Outcome = Outcome.UNSENT
    error: str = ""
    retry_after_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    first_tokens: int = 1
    gaps_s: Sequence[float] = ()
    cached_tokens: int | None = None
    prefill_cached_tokens: int = 0
    decode_cached_tokens: int = 0
    answer_digest: str = ""
    request_id: str = ""
    stages: dict[str, float] = {}
    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    kv_transport: str = ""
    kv_blocks: int = 0
    kv_bytes: int = 0
    attempts: int = 1
    prefill_attempts: int = 0
    steps: int = 0

    @property
    def is_prefilled_on_decode(self) -> bool:
        """Whether the worker that decoded it had computed its prompt too."""
        return self.prefill_worker_id in ("", self.decode_worker_id)

    @property
    def reused_tokens(self) -> int | None:
        """Of the prompt, those that nobody computed again: what the worker had that computed the rest. None: nobody says."""
        if not self.decode_worker_id:
            return self.cached_tokens
        return self.decode_cached_tokens if self.is_prefilled_on_decode else self.prefill_cached_tokens

    @property
    def lag_s(self) -> float | None:
        """How late it was sent."""
        return None if self.sent_s is None else self.sent_s - self.at_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.at_s

    @property
    def tpot_s(self) -> float | None:
        """None with a single token, which has nobody to come after."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """None unless it completed."""
        if self.outcome is not Outcome.COMPLETED or self.finished_s is None:
            return None
        return self.finished_s - self.at_s

    def is_good(self, objective: Objective) -> bool:
        """Whether it completed within the objective."""
        if self.outcome is not Outcome.COMPLETED or self.ttft_s is None:
            return False
        tpot_s = self.tpot_s
        return self.ttft_s <= objective.first_token_within_s(self.input_tokens) and (tpot_s is None or tpot_s <= objective.tpot_s)


def save_records(records: Iterable[RequestRecord], path: Path) -> None:
    """Writes JSON Lines, compressed when the name ends in .gz."""
    with open_text(path, "w") as file:
        for record in records:
            file.write(msgspec.json.encode(record).decode() + "\n")


def load_records(path: Path) -> list[RequestRecord]:
    """Reads what save_records() wrote. Raises BadInput for anything else."""
    with open_text(path, "r") as file:
        try:
            records = list(read_rows(file, RequestRecord, path))
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise BadInput(f"{path} cannot be read to its end: {error}") from None
    for number, record in enumerate(records, 1):
        for field in ("input_tokens", "planned_tokens", "output_tokens", "cached_tokens", "kv_bytes"):
            if (getattr(record, field) or 0) < 0:
                raise BadInput(f"{path}, request {number}: {field} is {getattr(record, field)}; it must be at least 0")
    return records
