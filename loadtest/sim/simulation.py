"""One simulation: builds workers and a router, runs a schedule through them, returns what happened."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.files import BadInput
from loadtest.schedule import Schedule
from loadtest.sim.events import Events
from loadtest.sim.links import Links
from loadtest.sim.mesh import SimMesh, SimRecord
from loadtest.sim.router import BatonRouter, RoundRobin, SimRouter
from loadtest.sim.worker import Chunks, SimWorker
from loadtest.sim.worker_model import WorkerModel
from services.router.admission import Admission
from services.router.cost_model import CostModel


class Policy(enum.StrEnum):
    BATON = "baton"
    ROUND_ROBIN = "round-robin"


class RouterModel(enum.StrEnum):
    LEARNT = "learnt"
    DECLARED = "declared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """
    records      of all requests, in the schedule's order
    workers      all of them, as they are in the end
    num_events   that happened
    sent_bytes   over all links
    """

    records: Sequence[SimRecord]
    workers: Sequence[SimWorker]
    num_events: int
    virtual_s: float
    sent_bytes: float


def simulate(
    schedule: Schedule,
    model: WorkerModel,
    *,
    num_prefill: int,
    num_decode: int,
    policy: Policy = Policy.BATON,
    router_model: RouterModel = RouterModel.LEARNT,
    chunks: Chunks | None = None,
    max_local_tokens: int | None = None,
    overhead_s: float | None = None,
    link_bytes_per_s: float | None = None,
) -> Simulation:
    """Runs a schedule to its end.

    chunks             None: even, as the engine's; but full in round robin, which is there to be compared with other simulators
    max_local_tokens   as the router's setting of that name
    link_bytes_per_s   of each worker's link, in each direction, shared by its transfers; None: blocks travel in no time
    overhead_s         from the router's decision until decode has the request; None: the model's
    Raises BadInput when the blocks of schedule and workers differ, or a request fits on no worker.
    """
    if schedule.block_size != model.block_size:
        raise BadInput(f"the schedule has blocks of {schedule.block_size} tokens, the workers of {model.block_size}")
    capacity = model.num_blocks * model.block_size
    for index, request in enumerate(schedule.requests):
        if request.input_tokens + request.output_tokens > capacity:
            raise BadInput(
                f"request {index} has {request.input_tokens} + {request.output_tokens} tokens, a worker's KV memory holds {capacity}"
            )
    if chunks is None:
        chunks = Chunks.FULL if policy is Policy.ROUND_ROBIN else Chunks.EVEN
    events = Events()
    links = None if link_bytes_per_s is None else Links(events, bytes_per_s=link_bytes_per_s)
    mesh = SimMesh(
        events,
        overhead_s=model.overhead_s if overhead_s is None else overhead_s,
        remote_overhead_s=model.remote_overhead_s,
        links=links,
    )
    prefill = [SimWorker(f"prefill-{index}", model, events, on_step=mesh.stepped, chunks=chunks) for index in range(num_prefill)]
    decode = [SimWorker(f"decode-{index}", model, events, on_step=mesh.stepped, chunks=chunks) for index in range(num_decode)]
    router: SimRouter
    if policy is Policy.ROUND_ROBIN:
        router = RoundRobin(prefill, decode)
    else:
        wire_s = 0.0 if link_bytes_per_s is None else model.block_bytes / link_bytes_per_s
        costs = (
            CostModel.declared(prefill=model.prefill, step=model.step, wire_s_per_block=wire_s)
            if router_model is RouterModel.DECLARED
            else CostModel.learnt(block_bytes=1 if links is None else model.block_bytes)
        )
        router = BatonRouter(
            prefill,
            decode,
            model=costs,
            block_size=model.block_size,
            # Nobody is turned away for the number of requests: that is a setting of the router, and no router compared with has it.
            admission=Admission(max_in_flight=len(schedule) + 1),
            max_local_tokens=max_local_tokens,
        )
    records = mesh.run(schedule, [*prefill, *decode], router)
    return Simulation(
        records=records,
        workers=[*prefill, *decode],
        num_events=events.num_happened,
        virtual_s=events.now_s,
        sent_bytes=0.0 if links is None else links.sent_bytes,
    )
