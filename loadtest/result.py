"""A run's result as one JSON file: what was asked, of whom, what came of it, whether it can be trusted. Versioned: readers check `format`.

The records of the requests lie beside it (`records`), since a report needs them and a dashboard does not.
"""

import datetime
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from loadtest.ceilings import Ceilings
from loadtest.files import BadInput
from loadtest.records import Objective, RequestRecord, load_records, save_records
from loadtest.schedule import Schedule
from loadtest.summary import Summary
from loadtest.verdict import Verdict as Verdict  # its name belongs to the format

FORMAT = "baton.loadtest/1"


class ScheduleFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Which schedule it was; equal digests mean that the same was asked."""

    source: str
    digest: str
    seed: int
    requests: int
    duration_s: float
    block_size: int

    @classmethod
    def of(cls, schedule: Schedule, *, duration_s: float) -> "ScheduleFacts":
        """duration_s: until the last arrival, which for a session's turns only the run knows."""
        return cls(
            source=schedule.source,
            digest=schedule.digest,
            seed=schedule.seed,
            requests=len(schedule),
            duration_s=duration_s,
            block_size=schedule.block_size,
        )


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """What served. Counts are None where a server does not say.

    blocks_per_worker, block_size, block_bytes   of one KV pool
    """

    target: str
    model: str = ""
    prefill_workers: int | None = None
    decode_workers: int | None = None
    blocks_per_worker: int | None = None
    block_size: int | None = None
    block_bytes: int | None = None

    @property
    def num_workers(self) -> int | None:
        """Of both kinds; None when neither is known."""
        known = [count for count in (self.prefill_workers, self.decode_workers) if count is not None]
        return sum(known) if known else None


class FaultMark(msgspec.Struct, frozen=True, kw_only=True):
    """A fault that was made to happen: when, to whom, and what it cost.

    detected_s    until the router no longer counted on it; recovered_s: until goodput was at 95 % of what it had been; None: never
    """

    at_s: float
    kind: str
    worker_id: str
    detected_s: float | None = None
    recovered_s: float | None = None


class Exactness(msgspec.Struct, frozen=True, kw_only=True):
    """What faults cost in answers, beside a run without.

    lost            accepted and not finished
    wrong           finished, with other tokens than without faults
    duplicated      with more tokens than were asked for
    compared        answers that both runs have
    leaked_blocks   KV blocks that still belonged to somebody when all was over
    """

    lost: int
    wrong: int
    duplicated: int
    compared: int
    leaked_blocks: int

    def problems(self) -> list[str]:
        """Empty when nothing was lost, wrong, duplicated or leaked."""
        counts = {"were lost": self.lost, "got wrong answers": self.wrong, "got more tokens than they asked for": self.duplicated}
        found = [f"{count:,} requests {words}" for words, count in counts.items() if count]
        if self.leaked_blocks:
            found.append(f"{self.leaked_blocks:,} KV blocks belonged to somebody after the run")
        return found

    def __str__(self) -> str:
        return (
            f"{self.compared:,} answers compared with those of a run without faults: {self.wrong:,} wrong, {self.duplicated:,} with tokens "
            f"twice; {self.lost:,} requests lost, {self.leaked_blocks:,} KV blocks leaked"
        )


class CapacityFound(msgspec.Struct, frozen=True, kw_only=True):
    """
    rate      requests per second, the highest that kept the goal with every seed; 0: none did
    fails_at  the lowest above it that did not; None: all did
    goal      attainment
    """

    rate: float
    fails_at: float | None
    goal: float

    def __str__(self) -> str:
        above = "nothing higher failed" if self.fails_at is None else f"{self.fails_at:.3g} fails"
        return f"capacity for an attainment of {self.goal:.0%}: {self.rate:.3g} requests/s ({above})"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run or one simulation."""

    format: str = FORMAT
    kind: str  # run, sim or imported
    name: str
    created: str  # ISO 8601, UTC
    command: tuple[str, ...]
    baton: str
    commit: str
    machine: str
    schedule: ScheduleFacts
    cluster: Cluster
    objective: Objective
    verdict: Verdict
    summary: Summary
    ceilings: Ceilings | None = None
    faults: tuple[FaultMark, ...] = ()
    exactness: Exactness | None = None
    capacity: CapacityFound | None = None
    extra: dict[str, Any] = {}
    records: str = ""  # file beside this one


def save_result(result: Result, records: Sequence[RequestRecord], path: Path) -> None:
    """Writes `path` (JSON) and the records beside it, as .requests.jsonl.gz."""
    records_path = path.with_suffix(".requests.jsonl.gz")
    save_records(records, records_path)
    named = msgspec.structs.replace(result, records=records_path.name)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(named), indent=2) + b"\n")


def load_result(path: Path) -> tuple[Result, list[RequestRecord]]:
    """Reads what save_result() wrote. Raises BadInput for anything else."""
    try:
        data = path.read_bytes()
        found = msgspec.json.decode(data, type=dict[str, Any]).get("format")
        if found != FORMAT:
            raise BadInput(f"{path} has format {found!r}, not {FORMAT}")
        result = msgspec.json.decode(data, type=Result)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: {error}") from None
    return result, load_records(path.parent / result.records) if result.records else []


def now() -> str:
    """For `created`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def this_machine() -> str:
    """For `machine`."""
    return f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def this_version() -> str:
    """For `baton`."""
    try:
        return version("baton")
    except PackageNotFoundError:
        return "unknown"


def this_commit() -> str:
    """For `commit`: of the source tree that runs, with + when it has changes; empty where there is none."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
