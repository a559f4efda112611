"""The fleet's books: what reports, dispatches and endings make of the estimates, who can be chosen, and that nothing stays counted."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protos.baton.v1.common_pb2 import WorkerLoad
from services.core.errors import OutOfBlocks, PeerUnavailable
from services.core.prefix_index import PrefixIndex
from services.router.cost_model import CostModel, DeclaredPrefill, DeclaredStep
from services.router.fleet import Fleet, InFlight, PrefillOutcome, Role, WorkerStatus
from services.router.policy import choose
from services.router.policy_loops import BLOCKS_AVAILABLE, FREE_AT_S, NUM_RUNNING
from services.router.route import Route, RouteRequest
from services.router.tracked_worker import FIRST_COOL_DOWN_S, LAST_COOL_DOWN_S, SILENT_S, STALE_S
from tests.unit.router.fleets import BLOCK_SIZE, LAYOUT, Load, make_fleet, route

PROMPT = RouteRequest(prompt_tokens=2048, max_output_tokens=100)
PROMPT_S = 5e-3 + 2048 * 50e-6  # in the declared model
SHORT = RouteRequest(prompt_tokens=64, max_output_tokens=32)
STEP_S = 10e-3  # in the declared model, in a pool that is next to empty


def status(fleet: Fleet, worker_id: str, now_s: float = 0.0) -> WorkerStatus:
    return next(worker for worker in fleet.workers(now_s) if worker.worker_id == worker_id)


def queue_s(fleet: Fleet, now_s: float) -> float:
    """Of the only prefill worker, as a new request would meet it."""
    chosen = route(fleet, PROMPT, now_s=now_s)
    assert chosen.remote_ttft_s is not None
    return chosen.remote_ttft_s - PROMPT_S - chosen.decode_wait_s


def outcome(worker_id: str, *, prefill_s: float = 0.1, **fields: object) -> PrefillOutcome:
    given_fields = {"queue_s": 0.0, "new_tokens": 2048, "cached_tokens": 0} | fields
    return PrefillOutcome(worker_id=worker_id, prefill_s=prefill_s, **given_fields)  # type: ignore[arg-type]


# Backlogs


def test_backlog_when_reported_is_worked_off_as_time_passes() -> None:
    fleet = make_fleet(prefill=1, num_running=40)
    fleet.report("prefill-0", Load(uncomputed_prompt_tokens=10_240), 0.0)
    first = queue_s(fleet, 0.0)
    assert first == pytest.approx(10_240 * 50e-6, rel=0.1)
    assert queue_s(fleet, 0.3) == pytest.approx(first - 0.3)
    assert queue_s(fleet, 0.9) == 0.0


def test_backlog_when_dispatched_counts_at_once_and_not_twice_when_reported() -> None:
    fleet = make_fleet(prefill=1, num_running=40)
    for _ in range(2):
        fleet.dispatched(route(fleet, PROMPT), 0.0)
    assert queue_s(fleet, 0.0) == pytest.approx(2 * PROMPT_S)
    # A report that cannot know of them yet, then one that does, before and after the first has been half computed.
    fleet.report("prefill-0", Load(), 0.01)
    assert queue_s(fleet, 0.01) == pytest.approx(2 * PROMPT_S)
    fleet.report("prefill-0", Load(uncomputed_prompt_tokens=2 * 2048), 0.1)
    assert queue_s(fleet, 0.1) == pytest.approx(2 * PROMPT_S)
    fleet.report("prefill-0", Load(uncomputed_prompt_tokens=1024 + 2048), 0.2)
    assert queue_s(fleet, 0.2) == pytest.approx(1.5 * PROMPT_S)


def test_backlog_when_the_first_of_several_is_half_computed_is_still_so_when_it_is_done() -> None:
    fleet = make_fleet(prefill=1, num_running=40)
    items = [fleet.dispatched(route(fleet, PROMPT), 0.0) for _ in range(3)]
    # Computed in order: the first is done, of the second one half is.
    fleet.report("prefill-0", Load(uncomputed_prompt_tokens=1024 + 2048), 0.1)
    fleet.first_token(items[0], 0.1)
    assert queue_s(fleet, 0.1) == pytest.approx(1.5 * PROMPT_S)
    fleet.failed(items[1], 0.1)
    assert queue_s(fleet, 0.1) == pytest.approx(PROMPT_S)


def test_backlog_when_a_report_has_what_was_sent_just_now_does_not_count_it_twice() -> None:
    fleet = make_fleet(prefill=1, num_running=40)
    fleet.dispatched(route(fleet, PROMPT), 0.0)
    fleet.report("prefill-0", Load(uncomputed_prompt_tokens=2048), 0.01)
    assert queue_s(fleet, 0.01) == pytest.approx(PROMPT_S)


def test_backlog_of_other_routers_is_added_to_ours() -> None:
    fleet = make_fleet(prefill=1, num_running=40)
    fleet.dispatched(route(fleet, PROMPT), 0.0)
    fleet.report("prefill-0", Load(uncomputed_prompt_tokens=2048 + 4096), 0.1)
    assert queue_s(fleet, 0.1) == pytest.approx(PROMPT_S + 4096 * 50e-6, rel=0.1)


def test_backlog_when_the_reported_tokens_may_all_be_ours_counts_what_was_predicted_for_them() -> None:
    # The worker reports whole prompts until it has looked into its cache.
    fleet = make_fleet(prefill=1, num_running=40)
    held = {"prefill-0": 24}
    chosen = route(fleet, PROMPT, held)
    fleet.dispatched(chosen, 0.0)
    fleet.report("prefill-0", Load(uncomputed_prompt_tokens=2048), 0.1)
    assert queue_s(fleet, 0.1) == pytest.approx(chosen.compute_s)
    assert chosen.compute_s < PROMPT_S / 2


def test_backlog_when_a_prompt_is_done_or_dropped_shrinks_without_a_report() -> None:
    fleet = make_fleet(prefill=1, num_running=40)
    items = [fleet.dispatched(route(fleet, PROMPT), 0.0) for _ in range(3)]
    fleet.first_token(items[0], 0.2)
    assert queue_s(fleet, 0.2) == pytest.approx(2 * PROMPT_S)
    fleet.failed(items[2], 0.2)
    assert queue_s(fleet, 0.2) == pytest.approx(PROMPT_S)


def test_backlog_of_a_request_that_waits_on_decode_is_kept_when_prefill_does_not_report_it() -> None:
    fleet = make_fleet(prefill=1, decode=1, num_running=64, num_waiting=30)
    chosen = route(fleet, PROMPT)
    assert chosen.decode_wait_s > 0.2 and not chosen.is_local
    fleet.dispatched(chosen, 0.0)
    fleet.report("prefill-0", Load(), 0.2)
    assert queue_s(fleet, 0.2) == pytest.approx(PROMPT_S)


def test_prompt_computed_on_decode_is_not_charged_with_the_step_of_the_others() -> None:
    fleets = [make_fleet(model=CostModel.learnt(block_bytes=1), num_running=n) for n in (0, 40)]
    factors = []
    for fleet in fleets:
        for i in range(20):
            chosen = route(fleet, RouteRequest(prompt_tokens=2048, must_be_local=True))
            item = fleet.dispatched(chosen, 0.1 * i)
            step_s = chosen.predicted_tpot_s if fleet is fleets[1] else 0.0
            outcome = PrefillOutcome(
                worker_id=chosen.decode_worker_id, queue_s=0.0, prefill_s=0.04 + step_s, new_tokens=2048, cached_tokens=0
            )
            fleet.prefill_done(item, outcome, 0.1 * i + 0.05)
            fleet.finished(item, 0.1 * i + 0.06, output_tokens=1)
        factors.append(fleet.model.prefill.seconds(2048, 0))
    assert factors[1] == pytest.approx(factors[0], rel=0.1)


# Decode


def test_decode_when_requests_are_sent_and_end_counts_them_until_reports_do() -> None:
    fleet = make_fleet(decode=1, num_running=10)
    items = [fleet.dispatched(route(fleet, PROMPT), 0.0) for _ in range(3)]
    assert status(fleet, "decode-0").num_requests == 13
    fleet.report("decode-0", Load(num_running=10), 0.01)  # too early to know
    assert status(fleet, "decode-0").num_requests == 13
    fleet.report("decode-0", Load(num_running=12, num_waiting=1), 0.1)
    assert status(fleet, "decode-0").num_requests == 13
    fleet.finished(items[0], 0.15, output_tokens=5)
    assert status(fleet, "decode-0").num_requests == 12
    fleet.report("decode-0", Load(num_running=12), 0.2)
    assert status(fleet, "decode-0").num_requests == 12


def test_decode_when_choices_are_many_counts_each() -> None:
    fleet = make_fleet(decode=1)
    one = route(fleet, PROMPT)
    several = route(fleet, RouteRequest(prompt_tokens=2048, max_output_tokens=100, num_choices=4))
    assert several.decode_blocks == one.decode_blocks + 3 * (100 // BLOCK_SIZE + 1)
    fleet.dispatched(several, 0.0)
    assert status(fleet, "decode-0").num_requests == 4


def test_decode_blocks_when_sent_are_taken_at_once() -> None:
    fleet = make_fleet(decode=1, blocks_free=40, num_running=4)
    first = route(fleet, PROMPT)
    assert first.decode_wait_s == 0.0
    item = fleet.dispatched(first, 0.0)
    assert route(fleet, PROMPT).decode_wait_s > 0.0
    fleet.failed(item, 0.0)
    assert route(fleet, PROMPT).decode_wait_s == 0.0


def test_decode_when_the_typical_answer_is_short_expects_places_back_sooner() -> None:
    fleet = make_fleet(decode=1, num_running=64)
    before = route(fleet, PROMPT).decode_wait_s
    for _ in range(100):
        fleet.finished(fleet.dispatched(route(fleet, PROMPT), 0.0), 0.0, output_tokens=4)
    assert route(fleet, PROMPT).decode_wait_s < 0.5 * before
    assert route(fleet, PROMPT).predicted_output_tokens < 100


def full(*, engine_steps: int = 0, num_waiting: int = 0, prefill_tokens: int = 0, step_s: float = 0.0) -> Load:
    """A report of a worker all four places of which are taken, in a huge pool."""
    return Load(
        num_running=4,
        max_num_seqs=4,
        num_waiting=num_waiting,
        engine_steps=engine_steps,
        decode_tokens=4 * engine_steps,
        prefill_tokens=prefill_tokens,
        step_s=step_s,
        blocks_total=10**9,
        blocks_free=10**9,
    )


def wait_steps(fleet: Fleet, now_s: float = 0.0) -> float:
    """Until decode-0 has room for one more, in the steps of the declared model."""
    return route(fleet, SHORT, now_s=now_s).decode_wait_s / STEP_S


def test_decode_when_its_requests_began_together_has_room_when_they_end_and_not_before() -> None:
    fleet = make_fleet(decode=1)
    items = [fleet.dispatched(route(fleet, SHORT), 0.0) for _ in range(4)]
    lifetime = fleet.model.mean_output_tokens
    fleet.report("decode-0", full(engine_steps=100), 1.0)
    assert wait_steps(fleet, 1.0) == pytest.approx(lifetime, rel=1e-3)  # none has a token yet
    for item in items:
        fleet.first_token(item, 1.0)
    for steps in (0, 12, 31):
        fleet.report("decode-0", full(engine_steps=100 + steps), 1.0)
        assert wait_steps(fleet, 1.0) == pytest.approx(32 - steps, rel=1e-3)
    queued = [fleet.dispatched(route(fleet, SHORT, now_s=1.0), 1.0) for _ in range(3)]
    assert wait_steps(fleet, 1.0) == pytest.approx(1, rel=1e-3)  # the fourth place comes free with the first
    queued.append(fleet.dispatched(route(fleet, SHORT, now_s=1.0), 1.0))
    assert wait_steps(fleet, 1.0) == pytest.approx(lifetime + 1, rel=1e-3)  # taken by one that waits, and free once more
    fleet.failed(queued.pop(), 1.0)
    fleet.failed(items.pop(), 1.0)
    assert wait_steps(fleet, 1.0) == pytest.approx(1, rel=1e-3)
    for item in (*queued, *items):
        fleet.failed(item, 1.0)
    fleet.report("decode-0", full(engine_steps=200), 1.2)
    assert wait_steps(fleet, 1.2) == pytest.approx(lifetime / 4, rel=1e-3)  # nothing of them is left


def test_decode_when_others_sent_its_requests_has_room_at_their_usual_rate() -> None:
    fleet = make_fleet(decode=1)
    fleet.report("decode-0", full(num_waiting=2), 0.0)
    assert wait_steps(fleet) == pytest.approx(fleet.model.mean_output_tokens * 3 / 4, rel=1e-3)


def test_decode_when_requests_wait_behind_those_of_others_does_not_take_them_for_those_that_run() -> None:
    fleet = make_fleet(decode=1)
    for _ in range(2):
        fleet.first_token(fleet.dispatched(route(fleet, SHORT), 0.0), 0.0)
    fleet.report("decode-0", full(), 1.0)
    for _ in range(2):
        fleet.dispatched(route(fleet, SHORT, now_s=1.0), 1.0)
    # The third place: the own two end after 32 steps, of the others' two one by half a lifetime.
    assert wait_steps(fleet, 1.0) == pytest.approx(fleet.model.mean_output_tokens / 2, rel=1e-3)


def test_decode_when_prompts_ride_along_has_room_as_late_as_they_make_it() -> None:
    fleet = make_fleet(decode=1)
    fleet.report("decode-0", full(), 0.0)
    before = wait_steps(fleet)
    for i in range(1, 16):
        fleet.report("decode-0", full(engine_steps=20 * i, prefill_tokens=10**5 * i, step_s=20 * 5 * STEP_S * i), float(i))
    assert wait_steps(fleet, 15.0) == pytest.approx(5 * before, rel=1e-3)
    assert route(fleet, SHORT, now_s=15.0).predicted_tpot_s == pytest.approx(STEP_S, rel=1e-3)


def test_decode_after_one_long_step_is_not_thought_slow() -> None:
    fleet = make_fleet(decode=1)
    fleet.report("decode-0", full(), 0.0)
    before = wait_steps(fleet)
    fleet.report("decode-0", full(engine_steps=1, prefill_tokens=10**6, step_s=15 * STEP_S), 1.0)
    assert wait_steps(fleet, 1.0) == before


# Who can be chosen


def test_worker_before_its_first_report_cannot_be_chosen() -> None:
    fleet = make_fleet(decode=0)
    fleet.join("decode-0", role=Role.DECODE, epoch=1, layout_fingerprint=LAYOUT)
    assert status(fleet, "decode-0").why_not == "no report yet"
    with pytest.raises(PeerUnavailable):
        route(fleet, PROMPT)
    fleet.report("decode-0", Load(), 0.0)
    assert route(fleet, PROMPT).decode_worker_id == "decode-0"


@pytest.mark.parametrize(
    ("worsen", "why_not"),
    [
        (lambda fleet: fleet.report("decode-0", Load(draining=True), 0.0), "draining"),
        (lambda fleet: fleet.join("decode-0", role=Role.DECODE, epoch=2, layout_fingerprint=b"other"), "another model or KV layout"),
    ],
)
def test_worker_when_it_drains_or_differs_is_seen_and_not_chosen(worsen: Callable[[Fleet], None], why_not: str) -> None:
    fleet = make_fleet()
    worsen(fleet)
    fleet.report("decode-0", Load(draining=why_not == "draining"), 0.0)
    worker = status(fleet, "decode-0")
    assert (worker.can_be_chosen, worker.why_not) == (False, why_not)
    assert {route(fleet, RouteRequest(prompt_tokens=64, spread=i)).decode_worker_id for i in range(4)} == {"decode-1"}


def test_worker_when_silent_is_avoided_then_not_chosen_and_comes_back_with_a_report() -> None:
    fleet = make_fleet()
    fleet.report("decode-1", Load(), 3.0)
    fleet.report("prefill-1", Load(), 3.0)
    # Both are idle, but nobody knows that of the silent ones any more.
    assert {route(fleet, RouteRequest(prompt_tokens=64, spread=i), now_s=3.0).decode_worker_id for i in range(4)} == {"decode-1"}
    alone = route(fleet, RouteRequest(prompt_tokens=64, excluded=("decode-1",)), now_s=3.0)
    assert alone.decode_worker_id == "decode-0" and alone.decode_wait_s == pytest.approx(3.0 - SILENT_S)
    late = STALE_S + 0.01
    fleet.report("decode-1", Load(), late)
    assert status(fleet, "decode-0", late).why_not == "silent for 5.0 s"
    with pytest.raises(PeerUnavailable):
        route(fleet, RouteRequest(prompt_tokens=64, excluded=("decode-1",)), now_s=late)
    fleet.report("decode-0", Load(), late + 1)
    assert route(fleet, RouteRequest(prompt_tokens=64, excluded=("decode-1",)), now_s=late + 1).decode_worker_id == "decode-0"


def test_worker_when_it_fails_is_avoided_longer_each_time_and_forgiven_when_it_serves() -> None:
    fleet = make_fleet()
    now_s = 0.0
    for expected_s in (FIRST_COOL_DOWN_S, 2 * FIRST_COOL_DOWN_S, 4 * FIRST_COOL_DOWN_S):
        fleet.failed(fleet.dispatched(route(fleet, PROMPT, now_s=now_s), now_s), now_s, blamed=("decode-0", "unknown"))
        for elapsed_s, avoided in ((0.9 * expected_s, True), (1.1 * expected_s, False)):
            for worker_id in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
                fleet.report(worker_id, Load(), now_s + elapsed_s)
            chosen = {route(fleet, RouteRequest(prompt_tokens=64, spread=i), now_s=now_s + elapsed_s).decode_worker_id for i in range(4)}
            assert ("decode-0" not in chosen) == avoided
        now_s += 1.2 * expected_s
    for _ in range(2000):
        fleet.failed(fleet.dispatched(route(fleet, PROMPT, now_s=now_s), now_s), now_s, blamed=("decode-0",))
    fleet.leave("decode-1")
    assert route(fleet, PROMPT, now_s=now_s).decode_wait_s == pytest.approx(LAST_COOL_DOWN_S)  # it is all there is
    fleet.finished(fleet.dispatched(route(fleet, PROMPT, now_s=now_s), now_s), now_s, output_tokens=1)
    fleet.failed(fleet.dispatched(route(fleet, PROMPT, now_s=now_s), now_s), now_s, blamed=("decode-0",))
    assert route(fleet, PROMPT, now_s=now_s).decode_wait_s == pytest.approx(FIRST_COOL_DOWN_S)


def test_worker_when_its_cool_down_is_over_needs_no_report_to_be_chosen() -> None:
    fleet = make_fleet()
    fleet.failed(fleet.dispatched(route(fleet, PROMPT), 0.0), 0.0, blamed=("prefill-0", "decode-0"))
    now_s = FIRST_COOL_DOWN_S + 0.01
    chosen = [route(fleet, RouteRequest(prompt_tokens=2048, spread=i), now_s=now_s) for i in range(4)]
    assert {one.decode_worker_id for one in chosen} == {"decode-0", "decode-1"}


def test_prefill_done_by_another_worker_blames_the_planned_one() -> None:
    fleet = make_fleet(num_running=40)
    item = fleet.dispatched(route(fleet, PROMPT), 0.0)
    assert item.route.prefill_worker_ids[0] == "prefill-0"
    fleet.prefill_done(item, outcome("prefill-1"), 0.1)
    for worker_id in ("prefill-0", "prefill-1"):
        fleet.report(worker_id, Load(), 0.1)
    assert {route(fleet, RouteRequest(prompt_tokens=2048, spread=i), now_s=0.1).prefill_worker_ids[0] for i in range(4)} == {"prefill-1"}


def test_prefill_done_by_decode_blames_only_those_that_failed() -> None:
    fleet = make_fleet(num_running=40)
    item = fleet.dispatched(route(fleet, PROMPT), 0.0)
    fleet.prefill_done(item, outcome(item.route.decode_worker_id), 0.1)
    assert {route(fleet, RouteRequest(prompt_tokens=2048, spread=i), now_s=0.1).prefill_worker_ids[0] for i in range(4)} > {"prefill-0"}
    item = fleet.dispatched(route(fleet, PROMPT, now_s=0.1), 0.1)
    fleet.prefill_done(item, outcome(item.route.decode_worker_id, failed=("prefill-0",)), 0.2)
    for worker_id in ("prefill-0", "prefill-1"):
        fleet.report(worker_id, Load(), 0.2)
    assert {route(fleet, RouteRequest(prompt_tokens=2048, spread=i), now_s=0.2).prefill_worker_ids[0] for i in range(4)} == {"prefill-1"}


def test_join_with_a_newer_epoch_forgets_what_the_old_one_had() -> None:
    fleet = make_fleet(prefill=1, num_running=40)
    items = [fleet.dispatched(route(fleet, PROMPT), 0.0) for _ in range(3)]
    fleet.join("prefill-0", role=Role.PREFILL, epoch=1, layout_fingerprint=LAYOUT)  # the same start, met again
    assert status(fleet, "prefill-0").own_prefills == 3
    fleet.join("prefill-0", role=Role.PREFILL, epoch=2, layout_fingerprint=LAYOUT)
    assert (status(fleet, "prefill-0").own_prefills, status(fleet, "prefill-0").epoch) == (0, 2)
    fleet.report("prefill-0", Load(), 0.0)
    assert queue_s(fleet, 0.0) == 0.0
    fleet.join("prefill-0", role=Role.PREFILL, epoch=1, layout_fingerprint=LAYOUT)  # an old message
    assert status(fleet, "prefill-0").epoch == 2
    for item in items:
        fleet.first_token(item, 0.1)
        fleet.finished(item, 0.2, output_tokens=1)
    assert queue_s(fleet, 0.0) == 0.0 and fleet.num_in_flight == 0


def test_fleet_when_workers_come_and_go_keeps_each_in_its_place() -> None:
    fleet = make_fleet(prefill=0, decode=1)
    index = PrefixIndex()
    hashes = [bytes([i]) * 16 for i in range(20)]
    for i in range(30):
        for role in Role:
            worker_id = f"{role.value}-{i}"
            fleet.join(worker_id, role=role, epoch=1, layout_fingerprint=LAYOUT)
            fleet.report(worker_id, Load(num_running=40), 0.0)
            index.replace(worker_id, epoch=1, sequence_number=0, hashes=hashes[: i % 20])
        if i % 3 == 0:
            fleet.leave(f"prefill-{i}")
            index.forget(f"prefill-{i}")
        best = max((j % 20, j) for j in range(i + 1) if j % 3)[1] if i else None
        chosen = choose(RouteRequest(prompt_tokens=2048), index.match(hashes), fleet.view(0.0, index.worker_ids))
        if best is not None:
            assert chosen.prefill_worker_ids[0] == f"prefill-{best}" or chosen.prefill_cached_tokens[0] == best % 20 * BLOCK_SIZE
            assert chosen.prefill_cached_tokens[0] == best % 20 * BLOCK_SIZE


def test_fleet_when_the_index_knows_a_worker_first_credits_it_from_its_join_and_nobody_after_it() -> None:
    fleet = make_fleet(prefill=1, num_running=40)
    held = {"prefill-1": 30}  # which is not there yet
    assert route(fleet, PROMPT, held).prefill_cached_tokens == (0,)
    for worker_id, cached_tokens in (("prefill-1", 30 * BLOCK_SIZE), ("prefill-2", 0)):
        fleet.join(worker_id, role=Role.PREFILL, epoch=1, layout_fingerprint=LAYOUT)
        fleet.report(worker_id, Load(), 0.0)
        chosen = route(fleet, RouteRequest(prompt_tokens=2048, excluded=("prefill-0",)), held)
        assert (chosen.prefill_worker_ids, chosen.prefill_cached_tokens) == ((worker_id,), (cached_tokens,))
        fleet.leave(worker_id)  # the next one gets its row
        assert route(fleet, PROMPT, held).prefill_cached_tokens == (0,)


def test_pool_when_a_smaller_one_is_reported_is_not_given_what_does_not_fit() -> None:
    fleet = make_fleet()
    route(fleet, PROMPT)
    fleet.report("decode-0", Load(blocks_total=32, blocks_free=32), 0.0)
    fleet.report("prefill-0", Load(blocks_total=31, blocks_free=31), 0.0)
    chosen = [route(fleet, RouteRequest(prompt_tokens=2048, spread=i)) for i in range(4)]
    assert {one.decode_worker_id for one in chosen} == {"decode-1"}
    assert {one.prefill_worker_ids for one in chosen} == {("prefill-1",)}


def test_blocks_when_taken_at_once_send_the_next_request_elsewhere() -> None:
    flat = DeclaredStep(constant_s=0.01, per_share_s=0.0, per_share_squared_s=0.0)
    prefill = DeclaredPrefill(constant_s=5e-3, per_token_s=50e-6, per_token_squared_s=0.0, chunk_tokens=1 << 20)
    fleet = make_fleet(model=CostModel.declared(prefill=prefill, step=flat, wire_s_per_block=1e-3), num_running=30)
    fleet.report("decode-0", Load(num_running=30, blocks_total=2000, blocks_free=40), 0.0)
    first = route(fleet, PROMPT, {"decode-0": 20})
    fleet.dispatched(first, 0.0)
    assert first.decode_worker_id == "decode-0"
    assert route(fleet, PROMPT, {"decode-0": 20}).decode_worker_id == "decode-1"


def test_report_takes_the_protobuf_message() -> None:
    fleet = make_fleet(decode=1)
    fleet.report("decode-0", WorkerLoad(num_running=3, num_waiting=1, blocks_total=100, blocks_free=50, max_num_seqs=8), 0.0)
    fleet.report("nobody", WorkerLoad(), 0.0)
    assert status(fleet, "decode-0").num_requests == 4


# Learning


def test_prefill_done_teaches_the_worker_that_computed() -> None:
    fleet = make_fleet(model=CostModel.learnt(block_bytes=1 << 20), num_running=40)
    for i in range(40):
        now_s = i * 0.2
        for worker_id in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            fleet.report(worker_id, Load(num_running=40), now_s)
        worker_id, other = f"prefill-{i % 2}", f"prefill-{1 - i % 2}"
        item = fleet.dispatched(route(fleet, RouteRequest(prompt_tokens=2048, excluded=(other,)), now_s=now_s), now_s)
        fleet.prefill_done(item, outcome(worker_id, prefill_s=0.3 if worker_id == "prefill-1" else 0.1), now_s + 0.1)
        fleet.finished(item, now_s + 0.15, output_tokens=10)
    slow, fast = status(fleet, "prefill-1").prefill_slowness, status(fleet, "prefill-0").prefill_slowness
    assert slow / fast == pytest.approx(3.0, rel=0.2)
    assert fleet.model.prefill.seconds(2048, 0) * fast == pytest.approx(0.1, rel=0.2)
    chosen = [route(fleet, RouteRequest(prompt_tokens=2048, spread=i), now_s=now_s) for i in range(4)]
    assert {one.prefill_worker_ids[0] for one in chosen} == {"prefill-0"}
    assert chosen[0].compute_s == pytest.approx(0.1, rel=0.2)


def test_slowness_when_a_worker_is_left_alone_is_forgotten() -> None:
    fleet = make_fleet(model=CostModel.learnt(block_bytes=1 << 20), num_running=40)
    for i in range(40):
        item = fleet.dispatched(route(fleet, RouteRequest(prompt_tokens=2048, excluded=(f"prefill-{1 - i % 2}",))), 0.1 * i)
        fleet.prefill_done(item, outcome(f"prefill-{i % 2}", prefill_s=0.3 if i % 2 else 0.1), 0.1 * i)
    before = status(fleet, "prefill-1").prefill_slowness
    for i in range(40, 1000):
        fleet.view(0.1 * i)
    assert status(fleet, "prefill-1").prefill_slowness < 0.75 * before
    assert status(fleet, "prefill-1").prefill_slowness == pytest.approx(status(fleet, "prefill-0").prefill_slowness, rel=0.05)


def test_slowness_of_a_worker_that_left_is_not_its_successor_s() -> None:
    fleet = make_fleet(model=CostModel.learnt(block_bytes=1 << 20), prefill=3, num_running=40)
    for i in range(60):
        others = tuple(f"prefill-{j}" for j in range(3) if j != i % 3)
        item = fleet.dispatched(route(fleet, RouteRequest(prompt_tokens=2048, excluded=others)), 0.05 * i)
        fleet.prefill_done(item, outcome(f"prefill-{i % 3}", prefill_s=0.1 if i % 3 else 0.3), 0.05 * i)
        fleet.view(0.05 * i)
    slow, fast = status(fleet, "prefill-0").prefill_slowness, status(fleet, "prefill-1").prefill_slowness
    assert slow > 2 * fast
    fleet.leave("prefill-0")
    fleet.join("prefill-9", role=Role.PREFILL, epoch=1, layout_fingerprint=LAYOUT)
    assert status(fleet, "prefill-9").prefill_slowness == pytest.approx(fast, rel=0.2)


def test_prefill_done_teaches_which_decode_worker_computes_prompts_slowly() -> None:
    fleet = make_fleet(model=CostModel.learnt(block_bytes=1 << 20), prefill=0)
    for i in range(30):
        item = fleet.dispatched(route(fleet, RouteRequest(prompt_tokens=2048, excluded=(f"decode-{1 - i % 2}",))), 0.01 * i)
        fleet.prefill_done(item, outcome(f"decode-{i % 2}", prefill_s=0.3 if i % 2 else 0.1), 0.01 * i)
        fleet.finished(item, 0.01 * i, output_tokens=1)
    for worker_id in ("decode-0", "decode-1"):
        fleet.report(worker_id, Load(), 1.0)
    chosen = [route(fleet, RouteRequest(prompt_tokens=2048, spread=i), now_s=1.0) for i in range(4)]
    assert {one.decode_worker_id for one in chosen} == {"decode-0"}
    assert chosen[0].compute_s == pytest.approx(0.1, rel=0.2)


def test_prefill_done_teaches_which_decode_worker_has_a_slow_link() -> None:
    fleet = make_fleet(model=CostModel.learnt(block_bytes=1 << 20), num_running=40)
    for i in range(40):
        now_s = i * 0.2
        for worker_id in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            fleet.report(worker_id, Load(num_running=40), now_s)
        request = RouteRequest(prompt_tokens=2048, excluded=(f"decode-{i % 2}",))
        item = fleet.dispatched(route(fleet, request, now_s=now_s), now_s)
        transfer_s = 2.0 if item.route.decode_worker_id == "decode-1" else 0.02
        fleet.prefill_done(item, outcome("prefill-0", transfer_s=transfer_s, tail_s=transfer_s, kv_blocks=32), now_s + 0.1)
        fleet.finished(item, now_s + 0.15, output_tokens=10)
    for worker_id in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
        fleet.report(worker_id, Load(num_running=40), now_s)
    chosen = [route(fleet, RouteRequest(prompt_tokens=2048, spread=i), now_s=now_s) for i in range(4)]
    assert {one.decode_worker_id for one in chosen} == {"decode-0"} and chosen[0].transfer_s < 0.1
    alone = route(fleet, RouteRequest(prompt_tokens=2048, excluded=("decode-0",), max_local_tokens=0), now_s=now_s)
    assert alone.transfer_s > 0.5


def test_prefill_done_teaches_what_calls_add_to_a_first_token() -> None:
    fleet = make_fleet(model=CostModel.learnt(block_bytes=1 << 20), prefill=1, num_running=40)
    for i in range(60):
        now_s = i * 0.3
        for worker_id in ("prefill-0", "decode-0", "decode-1"):
            fleet.report(worker_id, Load(num_running=40), now_s)
        item = fleet.dispatched(route(fleet, PROMPT, now_s=now_s), now_s)
        done = outcome("prefill-0", prefill_s=0.1, queue_s=0.01, decode_queue_s=0.02, tail_s=0.003, transfer_s=0.05, kv_blocks=32)
        fleet.prefill_done(item, done, now_s + 0.1 + 0.01 + 0.02 + 0.003 + 0.04)
        fleet.finished(item, now_s + 0.2, output_tokens=1)
    assert fleet.model.remote_overhead_s == pytest.approx(0.04, rel=0.1)
    assert fleet.model.local_overhead_s < 0.01


def test_reports_teach_the_step_time_of_each_decode_worker() -> None:
    fleet = make_fleet(model=CostModel.learnt(block_bytes=1 << 20))
    steps = 0
    for i in range(60):
        steps += 20
        for worker_id, step_s in (("decode-0", 10e-3), ("decode-1", 30e-3)):
            load = Load(num_running=10, blocks_free=5000, engine_steps=steps, decode_tokens=steps * 10, step_s=steps * step_s)
            fleet.report(worker_id, load, 0.2 * i)
        fleet.view(0.2 * i)
    slow, fast = status(fleet, "decode-1").step_slowness, status(fleet, "decode-0").step_slowness
    assert slow / fast == pytest.approx(3.0, rel=0.1)
    chosen = route(fleet, PROMPT, now_s=0.2 * 59)
    assert chosen.decode_worker_id == "decode-0" and chosen.predicted_tpot_s == pytest.approx(10e-3, rel=0.25)


def test_reports_when_steps_were_mostly_prompts_teach_nothing_about_decode() -> None:
    fleet = make_fleet(model=CostModel.learnt(block_bytes=1 << 20), decode=1)
    before = fleet.model.step.seconds(10, 0, 10_000)
    for i in range(10):
        load = Load(num_running=10, engine_steps=20 * i, decode_tokens=20 * i, prefill_tokens=12_000 * i, step_s=1.0 * i)
        fleet.report("decode-0", load, float(i))
    assert fleet.model.step.seconds(10, 0, 10_000) == before


# Nothing stays counted

WORKERS = [f"{role.value}-{i}" for role in Role for i in range(2)]
worker_ids = st.sampled_from(WORKERS)


class Bookkeeping(RuleBasedStateMachine):
    """Requests end in any order, twice, late, while workers report, leave, come back and fail."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = make_fleet(model=CostModel.learnt(block_bytes=1 << 20))
        self.epochs = dict.fromkeys(WORKERS, 1)
        self.items: list[InFlight] = []
        self.ended: list[InFlight] = []
        self.now_s = 0.0

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.3, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(
        prompt_tokens=st.integers(1, 5000),
        num_choices=st.integers(1, 3),
        held=st.dictionaries(worker_ids, st.integers(0, 40)),
        spread=st.integers(0, 5),
    )
    def send(self, prompt_tokens: int, num_choices: int, held: dict[str, int], spread: int) -> None:
        request = RouteRequest(prompt_tokens=prompt_tokens, num_choices=num_choices, spread=spread)
        try:
            chosen = route(self.fleet, request, held, now_s=self.now_s)
        except (PeerUnavailable, OutOfBlocks):
            return
        check_route(chosen)
        self.items.append(self.fleet.dispatched(chosen, self.now_s))

    @precondition(lambda self: self.items)
    @rule(data=st.data(), worker_id=worker_ids, seconds=st.sampled_from([-1.0, 0.0, 1e-9, 0.1, 1e9, math.inf, math.nan]))
    def prompt_done(self, data: st.DataObject, worker_id: str, seconds: float) -> None:
        item = data.draw(st.sampled_from(self.items + self.ended))
        done = outcome(worker_id, prefill_s=seconds, queue_s=seconds, transfer_s=seconds, tail_s=seconds, kv_blocks=3)
        self.fleet.prefill_done(item, done, self.now_s)

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        self.fleet.first_token(data.draw(st.sampled_from(self.items + self.ended)), self.now_s)

    @precondition(lambda self: self.items)
    @rule(data=st.data(), well=st.booleans(), blamed=st.lists(worker_ids, max_size=2))
    def end(self, data: st.DataObject, well: bool, blamed: list[str]) -> None:
        item = data.draw(st.sampled_from(self.items))
        self.items.remove(item)
        self.ended.append(item)
        if well:
            self.fleet.finished(item, self.now_s, output_tokens=data.draw(st.integers(0, 500)))
        else:
            self.fleet.failed(item, self.now_s, blamed=blamed)

    @precondition(lambda self: self.ended)
    @rule(data=st.data(), well=st.booleans())
    def end_again(self, data: st.DataObject, well: bool) -> None:
        item = data.draw(st.sampled_from(self.ended))
        if well:
            self.fleet.finished(item, self.now_s, output_tokens=1)
        else:
            self.fleet.failed(item, self.now_s)

    @rule(
        worker_id=worker_ids,
        load=st.builds(
            Load,
            num_running=st.integers(0, 100),
            uncomputed_prompt_tokens=st.integers(0, 10_000),
            blocks_free=st.integers(0, 10_000),
            engine_steps=st.integers(0, 100),
            decode_tokens=st.integers(0, 1000),
            step_s=st.floats(0, 10),
            draining=st.booleans(),
        ),
    )
    def report(self, worker_id: str, load: Load) -> None:
        self.fleet.report(worker_id, load, self.now_s)

    @rule(worker_id=worker_ids)
    def leave(self, worker_id: str) -> None:
        self.fleet.leave(worker_id)

    @rule(worker_id=worker_ids, newer=st.booleans())
    def join(self, worker_id: str, newer: bool) -> None:
        self.epochs[worker_id] += newer
        role = Role(worker_id.split("-")[0])
        self.fleet.join(worker_id, role=role, epoch=self.epochs[worker_id], layout_fingerprint=LAYOUT)

    @invariant()
    def counts_agree(self) -> None:
        assert self.fleet.num_in_flight == len(self.items)
        for worker in self.fleet.workers(self.now_s):
            assert worker.own_prefills <= len(self.items) and worker.own_requests <= len(self.items)
            assert worker.num_requests >= 0 and 0 < worker.prefill_slowness < math.inf and 0 < worker.step_slowness < math.inf

    def teardown(self) -> None:
        for item in self.items:
            self.fleet.failed(item, self.now_s)
        self.items.clear()
        self.now_s += 20.0
        for worker in self.fleet.workers(self.now_s):
            assert (worker.own_prefills, worker.own_requests) == (0, 0)
            self.fleet.report(worker.worker_id, Load(), self.now_s)
        self.counts_agree()
        assert all(worker.num_requests == 0 for worker in self.fleet.workers(self.now_s))
        view = self.fleet.view(self.now_s)
        for worker_id in WORKERS:
            table = view.prefill if worker_id.startswith("prefill") else view.decode
            if worker_id in table.worker_ids:
                row = table.worker_ids.index(worker_id)
                assert table.columns[FREE_AT_S, row] == self.now_s and table.columns[NUM_RUNNING, row] == 0
                assert table.columns[BLOCKS_AVAILABLE, row] == 10_000 or table is view.prefill


def check_route(chosen: Route) -> None:
    durations = (
        chosen.queue_s,
        chosen.compute_s,
        chosen.transfer_s,
        chosen.decode_wait_s,
        chosen.predicted_ttft_s,
        chosen.predicted_tpot_s,
    )
    assert all(0.0 <= seconds < math.inf for seconds in durations)


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(order=st.permutations(range(8)), doomed=st.sets(st.integers(0, 7)))
def test_in_flight_whatever_the_order_of_endings_comes_back_to_zero(order: list[int], doomed: set[int]) -> None:
    fleet = make_fleet(num_running=5)
    items = [fleet.dispatched(route(fleet, RouteRequest(prompt_tokens=500 * (i + 1), spread=i)), 0.0) for i in range(8)]
    for i in order:
        if i in doomed:
            fleet.failed(items[i], 0.1 * i)
        else:
            fleet.first_token(items[i], 0.1 * i)
            fleet.finished(items[i], 0.1 * i, output_tokens=3)
    assert fleet.num_in_flight == 0
    for worker in fleet.workers(0.8):
        assert (worker.own_prefills, worker.own_requests, worker.num_requests) == (0, 0, 5)
