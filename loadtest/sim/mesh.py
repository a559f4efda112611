"""A simulated mesh: requests on their way through a router, prefill and decode, in virtual time, as one request's tree of calls goes in the
product: decode takes room first, then calls prefill, and begins when the prompt is there. Blocks travel over the workers' links as their
chunks are computed, or in no time where links are free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from loadtest.ceilings import block_hash
from loadtest.schedule import PlannedRequest, Schedule
from loadtest.sim.events import Events
from loadtest.sim.links import Links
from loadtest.sim.router import Prompt, SimRouter, Ticket
from loadtest.sim.worker import Purpose, SimSequence, SimWorker
from services.core.errors import ResourceExhausted
from services.router.fleet import PrefillOutcome

HEARTBEAT_S = 0.5


@dataclass(slots=True, kw_only=True)
class SimRecord:
    """What became of one request; times from the start of the run, None where it did not come so far."""

    request: int
    at_s: float
    input_tokens: int
    output_tokens: int
    decode_worker_id: str = ""
    prefill_worker_id: str = ""  # whoever computed the prompt
    reserved_s: float | None = None
    prefill_began_s: float | None = None
    prefill_done_s: float | None = None
    landed_s: float | None = None  # all blocks on decode; None when decode computed the prompt
    first_token_s: float | None = None
    finished_s: float | None = None
    prefill_cached_tokens: int = 0
    decode_cached_tokens: int = 0
    kv_blocks: int = 0
    kv_bytes: int = 0  # that travelled over links
    refused: str = ""  # the error's name

    @property
    def ttft_s(self) -> float:
        assert self.first_token_s is not None
        return self.first_token_s - self.at_s

    @property
    def tpot_s(self) -> float | None:
        """None with a single token, which has nobody to come after."""
        assert self.first_token_s is not None
        assert self.finished_s is not None
        return (self.finished_s - self.first_token_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def queue_s(self) -> float:
        """From having room on decode to the prompt's first chunk."""
        assert self.prefill_began_s is not None
        assert self.reserved_s is not None
        return self.prefill_began_s - self.reserved_s

    @property
    def tail_s(self) -> float:
        """From the prompt computed to the last block landed; 0 when decode computed it."""
        if self.landed_s is None:
            return 0.0
        assert self.prefill_done_s is not None
        return self.landed_s - self.prefill_done_s


class SimMesh:
    """The way of requests between a router and workers.

    overhead_s          from the router's decision until decode has the request
    remote_overhead_s   more, when another worker computes the prompt: from room on decode until prefill has it
    links               that blocks travel over; None: in no time
    """

    def __init__(self, events: Events, *, overhead_s: float = 0.0, remote_overhead_s: float = 0.0, links: Links | None = None) -> None:
        self.links = links
        self.remote_overhead_s = remote_overhead_s
        self._events = events
        self._overhead_s = overhead_s
        self._workers: dict[str, SimWorker] = {}
        self._router: SimRouter | None = None
        self._schedule: Schedule | None = None
        self._records: list[SimRecord] = []
        self._followers: dict[int, list[int]] = {}
        self._num_open = 0

    def stepped(self, worker: SimWorker) -> None:
        """A worker's load and pool have changed: the router hears of it."""
        assert self._router is not None
        stored, removed = worker.pool.drain_changes()
        if stored or removed:
            self._router.blocks_changed(worker.worker_id, stored, removed)
        self._router.report(worker.worker_id, worker.load(), self._events.now_s)

    def run(self, schedule: Schedule, workers: Sequence[SimWorker], router: SimRouter) -> list[SimRecord]:
        """Sends a schedule's requests and follows them to their end; their records, in its order."""
        self._schedule, self._router = schedule, router
        self._workers = {worker.worker_id: worker for worker in workers}
        self._num_open = len(schedule)
        for index, request in enumerate(schedule.requests):
            record = SimRecord(request=index, at_s=request.at_s, input_tokens=request.input_tokens, output_tokens=request.output_tokens)
            self._records.append(record)
            if request.after is None:
                self._events.at(request.at_s, partial(self._arrive, request, record))
            else:
                self._followers.setdefault(request.after, []).append(index)
        for worker in workers:
            worker.pool.track_changes()
        self._beat()
        self._events.run()
        return self._records

    def _beat(self) -> None:
        """All workers say how they are, twice a second, as long as there is work."""
        assert self._router is not None
        if not self._num_open:
            return
        now_s = self._events.now_s
        for worker in self._workers.values():
            self._router.report(worker.worker_id, worker.load(), now_s)
        self._events.at(now_s + HEARTBEAT_S, self._beat)

    def _arrive(self, request: PlannedRequest, record: SimRecord) -> None:
        assert self._router is not None
        assert self._schedule is not None
        record.at_s = self._events.now_s
        prompt = Prompt(
            hashes=[block_hash(block_id) for block_id in request.block_ids()[: request.input_tokens // self._schedule.block_size]],
            tokens=request.input_tokens,
            output_tokens=request.output_tokens,
        )
        try:
            ticket = self._router.decide(prompt, self._events.now_s)
        except ResourceExhausted as refusal:
            record.refused = type(refusal).__name__
            self.ended(record)
            return
        prefill = None if ticket.prefill_worker_id is None else self._workers[ticket.prefill_worker_id]
        run = _Run(self, self._events, self._router, prompt, ticket, record, self._workers[ticket.decode_worker_id], prefill)
        if self._overhead_s:
            self._events.at(self._events.now_s + self._overhead_s, run.begin)
        else:
            run.begin()

    def ended(self, record: SimRecord) -> None:
        """A request is over: its session's next turn is planned."""
        assert self._schedule is not None
        self._num_open -= 1
        for index in self._followers.get(record.request, ()):
            follower = self._schedule.requests[index]
            self._events.at(self._events.now_s + follower.think_s, partial(self._arrive, follower, self._records[index]))


class _Run:
    """One request on its way; the owner of its sequence on decode."""

    def __init__(
        self,
        mesh: SimMesh,
        events: Events,
        router: SimRouter,
        prompt: Prompt,
        ticket: Ticket,
        record: SimRecord,
        decode: SimWorker,
        prefill: SimWorker | None,
    ) -> None:
        self._mesh, self._events, self._router = mesh, events, router
        self._prompt, self._ticket, self._record = prompt, ticket, record
        self._decode, self._prefill = decode, prefill
        record.decode_worker_id = decode.worker_id
        decodes_first = decode.model.decodes_first_token
        self._here = SimSequence(
            owner=self,
            hashes=prompt.hashes,
            prompt_tokens=prompt.tokens,
            decode_steps=record.output_tokens - (0 if decodes_first else 1),
            purpose=Purpose.GENERATE if prefill is None else Purpose.RECEIVE,
            has_first=not decodes_first,
        )

    def begin(self) -> None:
        """The request has come to decode."""
        self._decode.submit(self._here)

    # Of the sequence on decode

    def admitted(self) -> None:
        record, now_s = self._record, self._events.now_s
        if record.reserved_s is not None:
            return  # it was put back
        record.reserved_s = now_s
        record.decode_cached_tokens = self._here.num_cached
        if self._prefill is None:
            return
        if self._here.num_uncomputed <= self._ticket.local_prefill_tokens:
            self._prefill = None
            self._events.at(now_s, partial(self._decode.start, self._here, 0))
            return
        self._events.at(now_s + self._mesh.remote_overhead_s, self._call_prefill)

    def _call_prefill(self) -> None:
        assert self._prefill is not None
        _Prefill(self, self._prefill, self._prompt, self._mesh.links)

    def computed(self, num_tokens: int) -> None:
        record, now_s = self._record, self._events.now_s
        if record.prefill_began_s is None:
            record.prefill_began_s = self._decode.step_began_s
        if self._here.num_uncomputed or record.prefill_done_s is not None:
            return
        record.prefill_done_s = now_s
        record.prefill_worker_id = self._decode.worker_id
        if self._here.has_first:
            self._told_first()

    def first_step_done(self) -> None:
        if self._record.first_token_s is None:
            self._told_first()

    def finished(self) -> None:
        self._record.finished_s = self._events.now_s
        self._router.finished(self._ticket, self._events.now_s, self._record.output_tokens)
        self._mesh.ended(self._record)

    # Of the prefill elsewhere

    def prefill_began(self) -> None:
        self._record.prefill_began_s = self._events.now_s

    def prefilled(self) -> None:
        self._record.prefill_done_s = self._events.now_s

    @property
    def decode_worker_id(self) -> str:
        return self._decode.worker_id

    @property
    def blocks_here(self) -> int:
        """Of the prompt, that decode has had before."""
        return self._here.num_cached // self._decode.model.block_size

    def landed(self, remote: SimSequence, worker: SimWorker, kv_bytes: int) -> None:
        record, now_s = self._record, self._events.now_s
        record.landed_s = now_s
        record.kv_bytes = kv_bytes
        record.prefill_worker_id = worker.worker_id
        record.prefill_cached_tokens = remote.num_cached
        record.kv_blocks = len(self._here.block_ids) - self.blocks_here
        self._events.at(now_s, partial(worker.release, remote))
        if self._here.has_first:
            self._told_first()
        self._decode.start(self._here, self._prompt.tokens)

    def _told_first(self) -> None:
        record = self._record
        now_s = record.first_token_s = self._events.now_s
        assert record.reserved_s is not None
        assert record.prefill_began_s is not None
        assert record.prefill_done_s is not None
        is_local = record.prefill_worker_id == record.decode_worker_id
        cached = record.decode_cached_tokens if is_local else record.prefill_cached_tokens
        outcome = PrefillOutcome(
            worker_id=record.prefill_worker_id,
            decode_queue_s=record.reserved_s - record.at_s,
            queue_s=record.prefill_began_s - record.reserved_s - (0.0 if is_local else self._mesh.remote_overhead_s),
            prefill_s=record.prefill_done_s - record.prefill_began_s,
            new_tokens=record.input_tokens - cached,
            cached_tokens=cached,
            transfer_s=0.0 if record.landed_s is None else record.landed_s - record.prefill_began_s,
            tail_s=record.tail_s,
            kv_blocks=record.kv_blocks,
        )
        self._router.first_token(self._ticket, outcome, now_s)


class _Prefill:
    """A prompt computed for another worker, and its blocks on their way there."""

    def __init__(self, run: _Run, worker: SimWorker, prompt: Prompt, links: Links | None) -> None:
        self._run, self._worker = run, worker
        self._transfer = None if links is None else links.open(worker.worker_id, run.decode_worker_id, on_done=self._landed)
        self._num_sent = run.blocks_here  # blocks, from the start of the prompt, that need not be sent any more
        self._kv_bytes = 0
        self._sequence = SimSequence(
            owner=self, hashes=prompt.hashes, prompt_tokens=prompt.tokens, decode_steps=0, purpose=Purpose.PREFILL, has_first=True
        )
        worker.submit(self._sequence)

    def admitted(self) -> None:
        self._run.prefill_began()
        self._send(self._sequence.num_computed // self._worker.model.block_size)

    def computed(self, num_tokens: int) -> None:
        if self._sequence.num_uncomputed:
            self._send(self._sequence.num_computed // self._worker.model.block_size)
            return
        self._run.prefilled()
        self._send(len(self._sequence.block_ids))
        if self._transfer is None:
            self._landed()
        else:
            self._transfer.close()

    def first_step_done(self) -> None:
        raise AssertionError("a prompt for others does not decode")

    def finished(self) -> None:
        raise AssertionError("a prompt for others does not decode")

    def _send(self, num_blocks: int) -> None:
        """Of the prompt so many blocks, from its start, are there to be sent."""
        new, self._num_sent = max(0, num_blocks - self._num_sent), max(num_blocks, self._num_sent)
        if self._transfer is not None:
            self._kv_bytes += new * self._worker.model.block_bytes
            self._transfer.feed(new * self._worker.model.block_bytes)

    def _landed(self) -> None:
        self._run.landed(self._sequence, self._worker, self._kv_bytes)
