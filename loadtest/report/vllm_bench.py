"""`vllm bench serve --save-result --save-detailed`: one JSON object with a list for each quantity, seconds of one process's clock.

A request was meant to leave before it waited for `--max-concurrency`: `start_times` − `queue_times`, where the version writes these.
Source: vllm/benchmarks/serve.py of https://github.com/vllm-project/vllm
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadtest.files import BadInput, open_text
from loadtest.records import Outcome, RequestRecord

TOOL = "vllm bench serve"


class _File(msgspec.Struct):
    input_lens: list[int] = []
    output_lens: list[int] = []
    ttfts: list[float] = []
    itls: list[list[float]] = []
    start_times: list[float] = []
    latencies: list[float] | None = None
    queue_times: list[float] | None = None
    errors: list[str] = []


def read(path: Path) -> list[RequestRecord]:
    """Its requests, times on that process's clock. Raises BadInput for a file without details, or whose lists differ in length."""
    with open_text(path, "r") as file:
        try:
            found = msgspec.json.decode(file.read(), type=_File)
        except msgspec.MsgspecError as error:
            raise BadInput(f"{path}: {error}") from None
    if not found.start_times or not found.ttfts:
        raise BadInput(f"{path} has no start_times and ttfts of single requests: run with --save-result --save-detailed")
    number = len(found.ttfts)
    lists: dict[str, Sequence[object] | None] = {
        name: getattr(found, name) for name in ("input_lens", "output_lens", "itls", "start_times", "errors", "latencies")
    }
    for name, values in lists.items():
        if values is not None and len(values) != number:
            raise BadInput(f"{path}: {name} has {len(values)} values, ttfts has {number}")
    # With a limit of concurrency some versions keep only those of successful requests: they cannot be told apart then.
    waits_s = found.queue_times if found.queue_times is not None and len(found.queue_times) == number else [0.0] * number
    return [_record(found, index, waits_s[index]) for index in range(number)]


def _record(found: _File, index: int, wait_s: float) -> RequestRecord:
    sent_s, gaps_s, error = found.start_times[index], found.itls[index], found.errors[index]
    ttft_s = found.ttfts[index]
    has_begun = ttft_s > 0
    last_token_s = sent_s + ttft_s + sum(gaps_s)
    latency_s = found.latencies[index] if found.latencies is not None else 0.0
    return RequestRecord(
        index=0,
        at_s=sent_s - wait_s,
        sent_s=sent_s,
        input_tokens=found.input_lens[index],
        output_tokens=found.output_lens[index],
        outcome=Outcome.FAILED if error or not has_begun else Outcome.COMPLETED,
        error=error.strip().rsplit("\n", 1)[-1],
        first_token_s=sent_s + ttft_s if has_begun else None,
        last_token_s=last_token_s if has_begun else None,
        finished_s=max(last_token_s, sent_s + latency_s),
        gaps_s=gaps_s,
    )
