"""Fleets for the router's tests: joined, reported, and ready to be asked."""

from dataclasses import dataclass

import numpy as np

from services.core.prefix_index import Match
from services.router.cost_model import CostModel, DeclaredPrefill, DeclaredStep
from services.router.fleet import Fleet, Role
from services.router.policy import BALANCED, Weights, choose
from services.router.route import Route, RouteRequest
from services.router.worker_table import FleetView

BLOCK_SIZE = 64
LAYOUT = b"layout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A report of an idle worker, but for what is given."""

    num_running: int = 0
    num_waiting: int = 0
    uncomputed_prompt_tokens: int = 0
    blocks_total: int = 10_000
    blocks_free: int = 10_000
    blocks_cached: int = 0
    engine_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    step_s: float = 0.0
    draining: bool = False
    max_num_seqs: int = 64


def declared_model(*, constant_s: float = 5e-3, per_token_squared_s: float = 0.0, wire_s_per_block: float = 1e-3) -> CostModel:
    """5 ms and 50 µs per token of a prompt; steps of 10 ms when the pool is empty and 110 ms when it is full."""
    return CostModel.declared(
        prefill=DeclaredPrefill(constant_s=constant_s, per_token_s=50e-6, per_token_squared_s=per_token_squared_s, chunk_tokens=1 << 20),
        step=DeclaredStep(constant_s=10e-3, per_share_s=100e-3, per_share_squared_s=0.0),
        wire_s_per_block=wire_s_per_block,
    )


def make_fleet(*, prefill: int = 2, decode: int = 2, model: CostModel | None = None, now_s: float = 0.0, **load: object) -> Fleet:
    """Workers prefill-0 … and decode-0 …, all of which have reported `load`."""
    fleet = Fleet(layout_fingerprint=LAYOUT, block_size=BLOCK_SIZE, model=model or declared_model())
    for role, number in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        for i in range(number):
            fleet.join(f"{role.value}-{i}", role=role, epoch=1, layout_fingerprint=LAYOUT)
            fleet.report(f"{role.value}-{i}", Load(**load), now_s)  # type: ignore[arg-type]
    return fleet


def route(
    fleet: Fleet, request: RouteRequest, held: dict[str, int] | None = None, *, now_s: float = 0.0, weights: Weights = BALANCED
) -> Route:
    """Chooses; `held` is worker → leading blocks of the prompt that it holds."""
    worker_ids = sorted(held or {})
    runs: dict[int, int] = {}
    for slot, worker_id in enumerate(worker_ids):
        assert held is not None
        if held[worker_id]:
            runs[held[worker_id]] = runs.get(held[worker_id], 0) | 1 << slot
    matches = [Match(num_blocks=num_blocks, workers=runs[num_blocks]) for num_blocks in sorted(runs)]
    return choose(request, matches, fleet.view(now_s, worker_ids), weights=weights)


def snapshot(view: FleetView) -> list[np.ndarray]:
    """Copies of all that the policy may read."""
    return [view.prefill.columns.copy(), view.decode.columns.copy(), view.row_by_slot.copy()]
