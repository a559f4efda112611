"""One sender process: prepares its share of a schedule, waits for the start, sends each request at its time, tells what came of it.

Open loop: a request leaves when the schedule says so, however many are under way. Only a session's next turn waits, for the answer before
it and the user's thinking; its intended time is known when that answer has ended.
"""

import asyncio
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import msgspec
import uvloop

from loadtest.clients.answer import Answer, Client
from loadtest.clients.grpc_client import GrpcClient
from loadtest.clients.http_client import HttpClient
from loadtest.files import BadInput
from loadtest.records import Outcome, RequestRecord
from loadtest.run.job import Job, Progress, Start, Target
from loadtest.run.payloads import payload
from loadtest.schedule import PlannedRequest, Schedule
from loadtest.stages import stages_of

REPORT_S = 0.2
CONNECT_TIMEOUT_S = 10.0
PATHS = {"completions": "/completions", "chat": "/chat/completions"}


def shares(schedule: Schedule, num_senders: int) -> list[int]:
    """Which sender sends each request: in turn, a session's turns all by one."""
    found: list[int] = []
    num_heads = 0
    for request in schedule.requests:
        if request.after is None:
            found.append(num_heads % num_senders)
            num_heads += 1
        else:
            found.append(found[request.after])
    return found


async def open_client(target: Target) -> Client:
    """Connected. Raises BadInput when nobody answers there."""
    url = urlsplit(target.url)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            if url.scheme == "grpc":
                channel = GrpcClient(url.netloc)
                await channel.connect()
                return channel
            client = HttpClient(url, PATHS[target.endpoint], target.headers)
            await client.connect()
            return client
    except (TimeoutError, OSError, grpc.RpcError):
        raise BadInput(f"{target.url}: nobody answers there") from None


class Sender:
    """The requests of one share on their way."""

    def __init__(self, job: Job, schedule: Schedule) -> None:
        self._job = job
        mine = [index for index, sender in enumerate(shares(schedule, job.num_senders)) if sender == job.sender]
        self._requests = {index: schedule.requests[index] for index in mine}
        self._followers: dict[int, list[int]] = {}
        for index, request in self._requests.items():
            if request.after is not None:
                self._followers.setdefault(request.after, []).append(index)
        self._payloads = {
            index: payload(request, job.target, block_size=schedule.block_size, seed=job.prompt_seed)
            for index, request in self._requests.items()
        }
        self._finished: list[RequestRecord] = []
        self._num_sent = self._num_open = 0
        self._start_s = self._unix_offset_s = 0.0

    def progress(self, *, is_done: bool = False) -> Progress:
        """What has happened since it was asked last."""
        records, self._finished = self._finished, []
        return Progress(num_sent=self._num_sent, num_open=self._num_open, records=records, is_done=is_done)

    async def run(self, client: Client, start_s: float) -> None:
        """Sends everything; returns when the last answer has ended."""
        self._start_s, self._unix_offset_s = start_s, time.time() - time.monotonic()
        heads = sorted((request.at_s, index) for index, request in self._requests.items() if request.after is None)
        async with asyncio.TaskGroup() as tasks:
            for at_s, index in heads:
                await _sleep_until(start_s + at_s)
                tasks.create_task(self._send(client, index, at_s, tasks))

    async def _send(self, client: Client, index: int, at_s: float, tasks: asyncio.TaskGroup) -> None:
        self._num_sent += 1
        self._num_open += 1
        answer = Answer()
        await client.send(self._payloads.pop(index), answer, self._job.timeout_s)
        self._num_open -= 1
        self._finished.append(self._record(index, at_s, answer))
        for follower in self._followers.get(index, ()):
            due_s = answer.finished_s - self._start_s + self._requests[follower].think_s
            tasks.create_task(self._send_later(client, follower, due_s, tasks))

    async def _send_later(self, client: Client, index: int, at_s: float, tasks: asyncio.TaskGroup) -> None:
        await _sleep_until(self._start_s + at_s)
        await self._send(client, index, at_s, tasks)

    def _record(self, index: int, at_s: float, answer: Answer) -> RequestRecord:
        request, start_s, times = self._requests[index], self._start_s, answer.token_times
        record = RequestRecord(
            index=index,
            at_s=at_s,
            sent_s=answer.sent_s - start_s,
            session=request.session,
            tenant=request.tenant,
            input_tokens=request.input_tokens if answer.input_tokens is None else answer.input_tokens,
            planned_tokens=request.output_tokens,
            output_tokens=answer.output_tokens,
            outcome=_outcome(answer, request),
            error=answer.error,
            retry_after_s=answer.retry_after_s,
            finished_s=answer.finished_s - start_s,
            cached_tokens=answer.cached_tokens,
            answer_digest=answer.digest,
        )
        if not answer.error and record.outcome is Outcome.FAILED:
            record.error = f"WrongLength: {answer.output_tokens} of {request.output_tokens} tokens came"
        if times:
            record.first_token_s, record.last_token_s = times[0][0] - start_s, times[-1][0] - start_s
            record.first_tokens = times[0][1]
            record.gaps_s = tuple(round(after - before, 7) for (before, _), (after, _) in pairwise(times))
        if answer.timing is not None and times:
            self._attribute(record, answer)
        return record

    def _attribute(self, record: RequestRecord, answer: Answer) -> None:
        timing = answer.timing
        record.stages = stages_of(
            timing,
            client_sent_unix_s=answer.sent_s + self._unix_offset_s,
            client_first_unix_s=answer.token_times[0][0] + self._unix_offset_s,
            client_done_unix_s=answer.finished_s + self._unix_offset_s,
            client_lag_s=record.lag_s or 0.0,
        )
        field: Callable[[str], Any] = timing.get if isinstance(timing, dict) else partial(getattr, timing)
        record.request_id = field("request_id")
        record.prefill_worker_id, record.decode_worker_id = field("prefill_worker_id"), field("decode_worker_id")
        record.prefill_cached_tokens, record.decode_cached_tokens = field("prefill_cached_tokens"), field("decode_cached_tokens")
        record.kv_transport, record.kv_blocks, record.kv_bytes = field("kv_transport"), field("kv_blocks"), field("kv_bytes")
        record.attempts, record.prefill_attempts, record.steps = field("attempts"), field("prefill_attempts"), field("steps")


def _outcome(answer: Answer, request: PlannedRequest) -> Outcome:
    if answer.is_refused:
        return Outcome.REFUSED
    if answer.error or not answer.is_complete or answer.output_tokens != request.output_tokens:
        return Outcome.FAILED
    return Outcome.COMPLETED


async def _sleep_until(time_s: float) -> None:
    # The loop's timers are whole milliseconds, rounded: once is not enough, and a request that leaves early would look fast.
    while (left_s := time_s - time.monotonic()) > 0.0:  # noqa: ASYNC110  # time is no event
        await asyncio.sleep(left_s)


async def _serve(job: Job) -> None:
    sender = Sender(job, Schedule.load(Path(job.schedule)))
    client = await open_client(job.target)
    try:
        # Nothing that was prepared is garbage: looking through it again and again would hold requests up.
        gc.collect()
        gc.freeze()
        _say(sender.progress())
        line = await asyncio.to_thread(sys.stdin.buffer.readline)
        start = msgspec.json.decode(line, type=Start)
        run = asyncio.ensure_future(sender.run(client, start.start_s))
        while not run.done():
            await asyncio.wait((run,), timeout=REPORT_S)
            await asyncio.to_thread(_say, sender.progress())
        run.result()
        _say(sender.progress(is_done=True))
    finally:
        await client.close()


def _say(progress: Progress) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(progress) + b"\n")
    sys.stdout.buffer.flush()


def main(arguments: Sequence[str]) -> None:
    """`python -m loadtest.run.sender JOB`: one JSON object."""
    try:
        uvloop.run(_serve(msgspec.json.decode(arguments[0], type=Job)))
    except BadInput as error:
        _say(Progress(error=str(error), is_done=True))


if __name__ == "__main__":
    main(sys.argv[1:])
