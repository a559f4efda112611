"""The fleet in columns, so that the policy goes over a thousand workers in a few dozen operations. Written by fleet, read by policy."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.router.cost_model import CostModel, WorkerCosts

Floats = npt.NDArray[np.float64]

_COLUMNS = (
    "free_at_s",
    "reported_s",
    "blocks_total",
    "blocks_available",
    "s_per_missing_block",
    "num_running",
    "tpot_s",
    "tpot_s_per_block",
    "decode_costs",
)


class WorkerTable:
    """Columns over the workers of one role, as the policy reads them. Rows that nobody has cannot be chosen.

    free_at_s            when all prompts that the worker has will have been computed; inf: must not be chosen
    blocks_available     KV blocks that a request could own now
    s_per_missing_block  until running requests give one back
    num_running          in the batch
    tpot_s               seconds per step with one more request, plus tpot_s_per_block for each block of its own
    decode_costs         [3, rows], to be multiplied by (1, output tokens, output tokens × blocks):
                           seconds until there is a place for one more request; inf: must not be chosen
                           seconds that a token costs this request and, by slowing their steps, the others
                           the same for each block that the request owns
    """

    def __init__(self, model: CostModel) -> None:
        self.worker_ids: list[str] = []
        self.costs = WorkerCosts(model)
        self.free_at_s: Floats = np.zeros(0)
        self.reported_s: Floats = np.zeros(0)
        self.blocks_total: Floats = np.zeros(0)
        self.blocks_available: Floats = np.zeros(0)
        self.s_per_missing_block: Floats = np.zeros(0)
        self.num_running: Floats = np.zeros(0)
        self.tpot_s: Floats = np.zeros(0)
        self.tpot_s_per_block: Floats = np.zeros(0)
        self.decode_costs: Floats = np.zeros((3, 0))
        # No worker has less; columns need not be looked through for requests that are smaller.
        self.least_blocks_total = math.inf
        self.least_blocks_available = math.inf
        self._free_rows: list[int] = []

    @property
    def has_room(self) -> bool:
        return bool(self._free_rows)

    def take_row(self, worker_id: str) -> int:
        row = self._free_rows.pop()
        self.worker_ids[row] = worker_id
        return row

    def give_row(self, row: int) -> None:
        self.worker_ids[row] = ""
        for column in (self.free_at_s, self.reported_s, self.decode_costs[0], self.blocks_total, self.blocks_available):
            column[row] = np.inf
        self.costs.reset(row)
        self._free_rows.append(row)

    def grow(self) -> None:
        old = len(self.worker_ids)
        more = max(8, old)
        self.costs.resize(old + more)
        for name in _COLUMNS:
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros((*column.shape[:-1], more))], axis=-1))
        self.worker_ids.extend([""] * more)
        for row in reversed(range(old, old + more)):
            self.give_row(row)


@dataclass(slots=True, kw_only=True)
class FleetView:
    """The fleet as the policy is given it. These are the fleet's own columns: good until the fleet is told anything.

    free_at_s, prefill_factor   of both tables in one: rows of prefill, rows of decode, and one that nobody has; so `zeros`
    rows_by_slot                slot of the prefix index → row of these two
    """

    now_s: float
    block_size: int
    model: CostModel
    prefill: WorkerTable
    decode: WorkerTable
    free_at_s: Floats
    prefill_factor: Floats
    zeros: Floats
    rows_by_slot: list[int]
    row_column_by_slot: npt.NDArray[np.intp]
