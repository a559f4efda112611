"""The fleet in columns, so that the policy gets over a thousand workers in microseconds. Written by fleet, read by policy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.router.cost_model import CostModel, WorkerCosts
from services.router.policy_loops import (
    BLOCKS_TOTAL,
    FREE_AT_S,
    NUM_COLUMNS,
    PREFILL_FACTOR,
    REPORTED_S,
    STEP_FACTOR,
    WAIT_S,
    WIRE_FACTOR,
    Floats,
)


class WorkerTable:
    """`columns` [NUM_COLUMNS, rows] over the workers of one role. Rows that nobody has cannot be chosen.

    FREE_AT_S               when all prompts that the worker has will have been computed; inf: must not be chosen
    PREFILL_FACTOR, STEP_FACTOR, WIRE_FACTOR   slowness
    BLOCKS_TOTAL            KV blocks of its pool
    REPORTED_S              time of its last report
    and for decode workers:
    WAIT_S                  until there is a place for one more request; inf: must not be chosen
    TOKEN_COST_S            seconds that a token costs this request and, by slowing their steps, the others; plus
    TOKEN_COST_S_PER_BLOCK  for each block that the request owns
    NUM_RUNNING             requests in the batch
    BLOCKS_AVAILABLE        that a request could own now
    S_PER_MISSING_BLOCK     until running requests give one back
    TPOT_S                  seconds per step with one more request; plus
    TPOT_S_PER_BLOCK        for each block that the request owns
    """

    def __init__(self, model: CostModel) -> None:
        self.worker_ids: list[str] = []
        self.costs = WorkerCosts(model)
        self.columns: Floats = np.zeros((NUM_COLUMNS, 0))
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
        self.columns[[FREE_AT_S, WAIT_S, REPORTED_S], row] = np.inf
        self.columns[BLOCKS_TOTAL, row] = 0.0
        self.costs.reset(row)
        self._free_rows.append(row)

    def grow(self) -> None:
        old = len(self.worker_ids)
        more = max(8, old)
        self.columns = np.concatenate([self.columns, np.zeros((NUM_COLUMNS, more))], axis=1)
        self.costs.resize(prefill=self.columns[PREFILL_FACTOR], step=self.columns[STEP_FACTOR], wire=self.columns[WIRE_FACTOR])
        self.worker_ids.extend([""] * more)
        for row in reversed(range(old, old + more)):
            self.give_row(row)


@dataclass(slots=True, kw_only=True)
class FleetView:
    """The fleet as the policy is given it. These are the fleet's own columns: good until the fleet is told anything.

    row_by_slot   slot of the prefix index → row of its worker, those of decode counted on from prefill; one more for workers unknown here
    """

    now_s: float
    block_size: int
    model: CostModel
    prefill: WorkerTable
    decode: WorkerTable
    row_by_slot: npt.NDArray[np.int64]
