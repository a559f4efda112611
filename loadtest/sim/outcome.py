"""A simulation as a result like that of a run: the same records, figures and report."""

import sys

from loadtest.ceilings import Ceilings
from loadtest.records import Objective, Outcome, RequestRecord
from loadtest.result import Cluster, Result, ScheduleFacts, now, this_commit, this_machine, this_version
from loadtest.schedule import Schedule
from loadtest.sim.mesh import SimRecord
from loadtest.sim.simulation import Simulation
from loadtest.sim.worker_model import WorkerModel
from loadtest.summary import summarize
from loadtest.verdict import verdict


def result_of(
    simulation: Simulation,
    schedule: Schedule,
    model: WorkerModel,
    objective: Objective,
    ceilings: Ceilings,
    *,
    name: str,
    workers: tuple[int, int],
) -> tuple[Result, list[RequestRecord]]:
    """workers: prefill and decode ones. What nothing takes time for in a simulation (calls, hops) is no stage of it."""
    records = [_record(record, schedule) for record in simulation.records]
    duration_s = max((record.at_s for record in records), default=0.0)
    result = Result(
        kind="sim",
        name=name,
        created=now(),
        command=tuple(sys.argv),
        baton=this_version(),
        commit=this_commit(),
        machine=this_machine(),
        schedule=ScheduleFacts.of(schedule, duration_s=duration_s),
        cluster=Cluster(
            target="simulated",
            prefill_workers=workers[0],
            decode_workers=workers[1],
            blocks_per_worker=model.num_blocks,
            block_size=model.block_size,
        ),
        objective=objective,
        verdict=verdict(records, objective),
        summary=summarize(records, objective=objective, duration_s=duration_s, num_workers=sum(workers)),
        ceilings=ceilings,
    )
    return result, records


def _record(record: SimRecord, schedule: Schedule) -> RequestRecord:
    planned = schedule.requests[record.request]
    found = RequestRecord(
        index=record.request,
        at_s=record.at_s,
        sent_s=record.at_s,
        session=planned.session,
        tenant=planned.tenant,
        input_tokens=record.input_tokens,
        planned_tokens=record.output_tokens,
        outcome=Outcome.REFUSED if record.refused else Outcome.FAILED,
        error=record.refused,
        decode_worker_id=record.decode_worker_id,
        prefill_worker_id=record.prefill_worker_id,
        prefill_cached_tokens=record.prefill_cached_tokens,
        decode_cached_tokens=record.decode_cached_tokens,
        kv_blocks=record.kv_blocks,
        kv_bytes=record.kv_bytes,
        finished_s=record.at_s if record.refused else record.finished_s,
    )
    if record.finished_s is None:
        return found
    assert record.first_token_s is not None and record.reserved_s is not None and record.prefill_done_s is not None
    found.outcome, found.output_tokens = Outcome.COMPLETED, record.output_tokens
    found.first_token_s, found.last_token_s = record.first_token_s, record.finished_s
    found.cached_tokens = found.reused_tokens
    landed_s = record.prefill_done_s + record.tail_s
    found.stages = {
        "decode_queue": record.reserved_s - record.at_s,
        "prefill_queue": record.queue_s,
        "prefill": record.prefill_done_s - record.reserved_s - record.queue_s,
        "transfer_tail": record.tail_s,
        # Where decode makes the first token: until its first step on the prompt has ended.
        "first_token_return": record.first_token_s - landed_s,
        "decode": record.finished_s - record.first_token_s,
    }
    return found
