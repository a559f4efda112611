"""The cells of the fault matrix: who is struck, how, and at which step of a request. Pure; knows nothing of processes.

What has no meaning is left out:
    index, Redis × steps      no request waits for either, so that three steps stand for all seven
    kv × steps                a damaged block is in the transfer by nature: the first one, one in the middle, the last
    client                    leaves or runs out of time; nothing else of it is a fault of ours
    shm × reset, slow link    the data connection is a Unix socket, which knows neither; its death is that of one of its processes
"""

import enum
from dataclasses import dataclass
from typing import NamedTuple


class Step(enum.StrEnum):
    BEFORE_START = "before start"
    QUEUED = "queued"
    MID_PREFILL = "mid-prefill"
    MID_TRANSFER = "mid-transfer"
    BEFORE_FIRST_TOKEN = "before first token"
    MID_DECODE = "mid-decode"
    AT_END = "at end"


class Fault(enum.StrEnum):
    KILL = "kill -9"  # and started again when all requests have ended
    RESTART = "restart"  # the same, started again at once
    FREEZE = "SIGSTOP"  # and SIGCONT some seconds later
    TERM = "SIGTERM"
    RESET = "TCP reset"
    SLOW = "slow link"
    ERROR = "error"
    STUCK = "stuck in a block"
    CORRUPT = "byte flipped"
    DROP = "bytes dropped"
    CANCEL = "cancel"
    DEADLINE = "deadline"


class Place(NamedTuple):
    """Where a step is: at the nth hit of a point, in a process of a role."""

    role: str
    point: str
    nth: int


PLACES = {
    Step.BEFORE_START: Place("router", "router.before_start", 1),
    Step.QUEUED: Place("decode", "decode.started", 1),
    Step.MID_PREFILL: Place("prefill", "prefill.mid_prefill", 4),
    Step.MID_TRANSFER: Place("prefill", "prefill.mid_transfer", 4),
    Step.BEFORE_FIRST_TOKEN: Place("decode", "decode.landed", 1),
    Step.MID_DECODE: Place("decode", "decode.mid_decode", 8),
    Step.AT_END: Place("decode", "decode.at_end", 1),
}
_FEW_STEPS = (Step.BEFORE_START, Step.MID_PREFILL, Step.MID_DECODE)
_PROCESS_FAULTS = (Fault.KILL, Fault.RESTART, Fault.FREEZE, Fault.TERM, Fault.RESET, Fault.SLOW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """`service`: a role, "client", or the transport whose block is damaged; `block`: which one, counted from the fault on."""

    service: str
    fault: Fault
    step: Step
    block: int = 0

    def __str__(self) -> str:
        return " ".join([self.service, self.fault, self.step, *([f"block {self.block}"] if self.block else [])])


def all_cells() -> list[Cell]:
    cells = []
    for service in ("router", "prefill", "decode"):
        cells += [Cell(service=service, fault=fault, step=step) for fault in _PROCESS_FAULTS for step in Step]
    for service in ("kv_index", "redis"):
        cells += [Cell(service=service, fault=fault, step=step) for fault in _PROCESS_FAULTS for step in _FEW_STEPS]
    cells += [Cell(service="prefill", fault=Fault.ERROR, step=step) for step in (Step.MID_PREFILL, Step.MID_TRANSFER)]
    cells += [Cell(service="prefill", fault=Fault.STUCK, step=Step.MID_TRANSFER)]
    for transport in ("shm", "tcp", "grpc"):
        for fault in (Fault.CORRUPT, Fault.DROP):
            cells += [Cell(service=transport, fault=fault, step=Step.MID_TRANSFER, block=block) for block in (1, 12, 23)]
    cells += [Cell(service="client", fault=fault, step=step) for fault in (Fault.CANCEL, Fault.DEADLINE) for step in Step]
    return cells


def chosen_cells() -> list[Cell]:
    """What every run of the tests tries: each service with each of its faults, and each step with something that hurts there."""
    steps = {
        ("router", Fault.KILL): (Step.MID_PREFILL, Step.MID_DECODE),
        ("router", Fault.FREEZE): (Step.MID_DECODE,),
        ("router", Fault.TERM): (Step.MID_PREFILL,),
        ("router", Fault.RESET): (Step.MID_DECODE,),
        ("prefill", Fault.KILL): (Step.MID_PREFILL, Step.MID_TRANSFER),
        ("prefill", Fault.RESTART): (Step.BEFORE_FIRST_TOKEN,),
        ("prefill", Fault.FREEZE): (Step.MID_TRANSFER,),
        ("prefill", Fault.TERM): (Step.MID_PREFILL,),
        ("prefill", Fault.RESET): (Step.MID_TRANSFER,),
        ("prefill", Fault.SLOW): (Step.QUEUED,),
        ("prefill", Fault.ERROR): (Step.MID_PREFILL,),
        ("prefill", Fault.STUCK): (Step.MID_TRANSFER,),
        ("decode", Fault.KILL): (Step.BEFORE_START, Step.QUEUED, Step.MID_TRANSFER, Step.MID_DECODE),
        ("decode", Fault.RESTART): (Step.AT_END,),
        ("decode", Fault.FREEZE): (Step.MID_PREFILL, Step.MID_DECODE),
        ("decode", Fault.TERM): (Step.MID_DECODE,),
        ("decode", Fault.RESET): (Step.BEFORE_FIRST_TOKEN, Step.MID_DECODE),
        ("decode", Fault.SLOW): (Step.MID_TRANSFER,),
        ("kv_index", Fault.KILL): (Step.BEFORE_START,),
        ("kv_index", Fault.FREEZE): (Step.MID_PREFILL,),
        ("redis", Fault.KILL): (Step.MID_DECODE,),
        ("redis", Fault.FREEZE): (Step.BEFORE_START,),
        ("client", Fault.CANCEL): tuple(Step),
        ("client", Fault.DEADLINE): (Step.QUEUED, Step.MID_TRANSFER, Step.MID_DECODE),
    }
    return [cell for cell in all_cells() if cell.step in steps.get((cell.service, cell.fault), ()) or cell.block in (1, 23)]
