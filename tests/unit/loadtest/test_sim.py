"""The simulator: hand-computed times, and what no run may lose or invent."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from loadtest.app import app
from loadtest.ceilings import block_hash, ceilings
from loadtest.files import BadInput
from loadtest.result import load_result
from loadtest.schedule import PlannedRequest, Schedule
from loadtest.sim import simulation as simulation_module
from loadtest.sim.events import Events
from loadtest.sim.policy_table import DYNAMO, SPEEDUPS, policy_table
from loadtest.sim.router import BatonRouter, Prompt, Routed
from loadtest.sim.simulation import Policy, RouterModel, Simulation, simulate
from loadtest.sim.worker import Chunks, SimWorker
from loadtest.sim.worker_model import Chunk, WorkerModel, declared
from services.router.admission import Admission
from services.router.cost_model import CostModel, DeclaredPrefill, DeclaredStep
from services.router.fleet import PrefillOutcome

BLOCK = 8


def _model(**changes: object) -> WorkerModel:
    """10 ms and 1 ms a token for a chunk of at most 16 tokens, 5 ms for a step of decoding; 20 blocks of 8 tokens."""
    model = WorkerModel(
        prefill=DeclaredPrefill(constant_s=10e-3, per_token_s=1e-3, per_token_squared_s=0.0, chunk_tokens=16),
        step=DeclaredStep(constant_s=5e-3, per_share_s=0.0, per_share_squared_s=0.0),
        pools_chunks=True,
        block_size=BLOCK,
        num_blocks=20,
        chunk_tokens=16,
        max_num_seqs=8,
        decodes_first_token=True,
        block_bytes=1000,
    )
    return dataclasses.replace(model, **changes)  # type: ignore[arg-type]


def _request(at_s: float, input_tokens: int, output_tokens: int, first_block: int, **fields: object) -> PlannedRequest:
    runs = ((first_block, -(-input_tokens // BLOCK)),)
    return PlannedRequest(at_s=at_s, input_tokens=input_tokens, output_tokens=output_tokens, block_runs=runs, **fields)  # type: ignore[arg-type]


def _simulate(
    *requests: PlannedRequest, model: WorkerModel | None = None, num_prefill: int = 1, num_decode: int = 1, **options: object
) -> Simulation:
    schedule = Schedule(block_size=BLOCK, requests=requests, source="test")
    return simulate(schedule, model or _model(), num_prefill=num_prefill, num_decode=num_decode, **options)  # type: ignore[arg-type]


def test_one_request_takes_its_chunks_and_its_steps() -> None:
    # 16 + 4 tokens: 26 ms and 14 ms; then three steps of 5 ms, the first of which gives the first token.
    (record,) = _simulate(_request(1.0, 20, 3, 0), policy=Policy.ROUND_ROBIN).records
    assert record.prefill_done_s == pytest.approx(1.040)
    assert record.first_token_s == pytest.approx(1.045)
    assert record.finished_s == pytest.approx(1.055)
    assert record.ttft_s == pytest.approx(0.045)
    assert record.tpot_s == pytest.approx(0.005)


def test_first_token_when_prefill_samples_it_is_there_with_the_prompt() -> None:
    (record,) = _simulate(_request(0.0, 20, 3, 0), policy=Policy.ROUND_ROBIN, model=_model(decodes_first_token=False)).records
    assert record.first_token_s == pytest.approx(0.040)
    assert record.finished_s == pytest.approx(0.050)


def test_overhead_comes_before_all_that_workers_do() -> None:
    (record,) = _simulate(_request(1.0, 20, 3, 0), policy=Policy.ROUND_ROBIN, overhead_s=0.25).records
    assert record.at_s == 1.0
    assert record.ttft_s == pytest.approx(0.25 + 0.045)


def test_blocks_over_a_link_leave_while_the_next_chunk_is_computed() -> None:
    # Chunks of 16 and 4 tokens: 2 blocks are there at 26 ms, the last one at 40. A block of 1,000 bytes takes 10 ms: the first two need
    # until 46, the third until 56; then the first step.
    (record,) = _simulate(_request(0.0, 20, 3, 0), policy=Policy.ROUND_ROBIN, link_bytes_per_s=1e5).records
    assert record.prefill_done_s == pytest.approx(0.040)
    assert record.landed_s == pytest.approx(0.056)
    assert record.first_token_s == pytest.approx(0.061)
    assert (record.kv_blocks, record.kv_bytes) == (3, 3000)


def test_blocks_that_decode_has_are_not_sent_again() -> None:
    first, second = _simulate(_request(0.0, 20, 3, 0), _request(1.0, 20, 3, 0), policy=Policy.ROUND_ROBIN, link_bytes_per_s=1e5).records
    assert (first.kv_bytes, second.kv_bytes) == (3000, 1000)
    assert second.landed_s == pytest.approx(1.0 + 0.014 + 0.010)


def test_single_token_when_prefill_samples_it_needs_no_step() -> None:
    (record,) = _simulate(_request(0.0, 20, 1, 0), policy=Policy.ROUND_ROBIN, model=_model(decodes_first_token=False)).records
    assert record.finished_s == pytest.approx(0.040)
    assert record.tpot_s is None


def test_second_prompt_shares_what_is_left_of_a_chunk_and_finds_the_prefix() -> None:
    # The first prompt leaves 12 tokens of its second chunk to the second one, whose first two blocks it has computed by then.
    simulation = _simulate(_request(0.0, 20, 1, 0), _request(0.001, 20, 1, 0), policy=Policy.ROUND_ROBIN)
    first, second = simulation.records
    assert second.prefill_cached_tokens == 16
    assert first.prefill_done_s == second.prefill_done_s == pytest.approx(0.026 + 0.010 + 0.008)


@pytest.mark.parametrize(
    ("chunks", "first_done_s", "second_done_s"),
    [
        # Steps of 10, 10 + 2 tokens: room for all of the second prompt in the second one.
        (Chunks.EVEN, 0.020 + 0.022, 0.020 + 0.022),
        # 16, 4 + 2.
        (Chunks.FULL, 0.026 + 0.016, 0.026 + 0.016),
        # As the router's kind has it: round robin is there to be compared.
        (None, 0.026 + 0.016, 0.026 + 0.016),
    ],
)
def test_long_prompt_is_cut_evenly_or_not(chunks: Chunks | None, first_done_s: float, second_done_s: float) -> None:
    requests = _request(0.0, 20, 1, 0), _request(0.001, 2, 1, 100)
    first, second = _simulate(*requests, policy=Policy.ROUND_ROBIN, chunks=chunks).records
    assert (first.prefill_done_s, second.prefill_done_s) == pytest.approx((first_done_s, second_done_s))
    assert second.prefill_began_s == pytest.approx(first_done_s - (0.022 if chunks is Chunks.EVEN else 0.016))


def test_whoever_comes_during_a_step_of_decoding_joins_after_it() -> None:
    # The first decodes from 40 ms on. The second gets room on decode when the step ends at 45, so that its prompt is done at 57.
    simulation = _simulate(_request(0.0, 20, 100, 0), _request(0.0405, 2, 2, 50), policy=Policy.ROUND_ROBIN)
    _, second = simulation.records
    assert second.prefill_done_s == pytest.approx(0.057)
    assert second.first_token_s == pytest.approx(0.065)  # it joins the step that begins at 60
    assert second.finished_s == pytest.approx(0.070)


def test_decode_that_computes_a_prompt_itself_does_both_in_one_step() -> None:
    simulation = _simulate(_request(0.0, 4, 100, 0), _request(0.1, 6, 2, 50), num_prefill=0)
    first, second = simulation.records
    # Prompt 14 ms, steps at 19, 24, … 99, 104: from 104 on one step of 5 + 16 ms has the second prompt, the next one decodes both.
    assert first.first_token_s == pytest.approx(0.019)
    assert second.prefill_began_s == pytest.approx(0.104)
    assert second.first_token_s == pytest.approx(0.130)
    assert first.finished_s == pytest.approx(0.014 + 0.5 + 0.016)


def test_prompt_that_decode_computes_after_all_is_queued_until_the_step_that_has_it() -> None:
    # It has room when the step ends at 104 ms; by the time decode is told to compute it the next one runs, until 109.
    first, second = _simulate(
        _request(0.0, 4, 100, 0), _request(0.1, 6, 2, 50), router_model=RouterModel.DECLARED, model=_model(num_blocks=40)
    ).records
    assert second.prefill_worker_id == second.decode_worker_id == first.decode_worker_id
    assert second.reserved_s is not None
    assert second.prefill_began_s == pytest.approx(second.reserved_s + 0.005)
    assert second.prefill_done_s == pytest.approx(second.reserved_s + 0.005 + 0.021)


@pytest.mark.parametrize(("num_blocks", "preemptions", "prefill_tokens"), [(8, 0, 16), (7, 1, 33)])
def test_sequence_that_needs_a_block_when_there_is_none_is_put_back_and_computed_again(
    num_blocks: int, preemptions: int, prefill_tokens: int
) -> None:
    # Prompts of a block each, which need another one for their 2nd, 10th and 18th step: four in the end. Of seven none is left for the
    # second one's fourth: its tokens are computed again behind its prompt, whose block is still cached.
    simulation = _simulate(
        _request(0.0, 8, 20, 0), _request(0.0, 8, 20, 50), model=_model(num_blocks=num_blocks), num_prefill=0, num_decode=1
    )
    (worker,) = simulation.workers
    assert worker.num_preemptions == preemptions
    assert worker.num_prefill_tokens == prefill_tokens
    assert worker.num_decode_tokens == 40


def test_router_that_was_wrong_about_a_worker_does_not_believe_it_again() -> None:
    worker = SimWorker("decode-0", _model(), Events(), on_step=lambda _: None)
    costs = CostModel.learnt(block_bytes=1)
    router = BatonRouter([], [worker], model=costs, block_size=BLOCK, admission=Admission(max_in_flight=9), max_local_tokens=None)
    prompt = Prompt(hashes=[block_hash(1), block_hash(2)], tokens=20, output_tokens=4)
    router.blocks_changed("decode-0", prompt.hashes, [])
    cached = []
    for found in (0, 0):
        ticket = router.decide(prompt, 0.0)
        assert isinstance(ticket, Routed)
        cached.append(ticket.route.decode_cached_tokens)
        outcome = PrefillOutcome(worker_id="decode-0", queue_s=0.0, prefill_s=0.01, new_tokens=20, cached_tokens=found)
        router.first_token(ticket, outcome, 0.01)
        router.finished(ticket, 0.02, 4)
    assert cached == [16, 0]


def test_step_counts_the_context_of_those_that_decode_and_nothing_else() -> None:
    # A step takes 100 ms × the share of the pool that is read: 8 of 20 blocks while prompts wait, are computed, or lie in caches.
    model = _model(step=DeclaredStep(constant_s=0.0, per_share_s=0.1, per_share_squared_s=0.0), max_num_seqs=2)
    first, _, third = _simulate(
        _request(0.0, 64, 8, 0),
        _request(0.0, 64, 1, 50),  # has room on decode while the first one decodes alone
        _request(1.0, 64, 1, 0),  # reads what lies in the cache
        policy=Policy.ROUND_ROBIN,
        model=model,
    ).records
    assert first.first_token_s is not None
    assert first.prefill_done_s is not None
    assert first.first_token_s - first.prefill_done_s == pytest.approx(0.1 * 64 / (20 * BLOCK))
    assert third.first_token_s is not None
    assert third.prefill_done_s is not None
    assert third.first_token_s - third.prefill_done_s == pytest.approx(0.1 * 64 / (20 * BLOCK))


def test_step_when_a_sequence_has_left_counts_it_no_longer() -> None:
    # A token of context takes 1 ms. Prompts are there at 18 and 36 ms; the first one's steps end at 26, 35 and 44 (8 tokens, then a stretch
    # of 9), one for both at 63 (11 + 8), and the last two take 12 each.
    model = _model(step=DeclaredStep(constant_s=0.0, per_share_s=0.16, per_share_squared_s=0.0))
    first, second = _simulate(_request(0.0, 8, 6, 0), _request(0.0, 8, 1, 50), policy=Policy.ROUND_ROBIN, model=model).records
    assert second.finished_s == pytest.approx(0.063)
    assert first.finished_s == pytest.approx(0.087)


def test_next_turn_comes_its_thinking_time_after_the_answer() -> None:
    first, second = _simulate(_request(0.0, 20, 3, 0), _request(0.0, 28, 2, 0, after=0, think_s=2.0), policy=Policy.ROUND_ROBIN).records
    assert first.finished_s is not None
    assert second.at_s == first.finished_s + 2.0
    assert second.prefill_cached_tokens == 16


def test_simulate_when_a_request_fits_nowhere_names_it() -> None:
    with pytest.raises(BadInput, match="request 1 has 150"):
        _simulate(_request(0.0, 20, 3, 0), _request(0.0, 150, 30, 60))


def test_simulate_when_blocks_differ_says_so() -> None:
    with pytest.raises(BadInput, match="512"):
        _simulate(_request(0.0, 20, 3, 0), model=declared())


def test_declared_step_is_what_the_published_curves_say() -> None:
    model = declared()
    assert model.step_s([Chunk(1000, 0)], 0, 0) == pytest.approx(16.50142e-3 + 15.18344e-3 + 0.4209989e-3)
    assert model.step_s([Chunk(600, 0), Chunk(400, 8192)], 0, 0) == model.step_s([Chunk(1000, 0)], 0, 0)
    assert model.step_s([], 5, 1000) == pytest.approx((5.74 + 54.01 / 2 - 25.74 / 4) * 1e-3)


class _CheckedEvents(Events):
    """Looks after every event whether time has gone back, and whether each worker's blocks are all there."""

    def __init__(self) -> None:
        super().__init__()
        self.workers: list[SimWorker] = []

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        before_s = self.now_s

        def checked() -> None:
            assert self.now_s >= before_s
            action()
            for worker in self.workers:
                pool = worker.pool
                assert pool.num_free + pool.num_cached + pool.num_owned == pool.num_blocks

        super().at(time_s, checked)


def _remembered_worker(
    worker_id: str, model: WorkerModel, events: _CheckedEvents, *, on_step: Callable[[SimWorker], None], chunks: Chunks
) -> SimWorker:
    worker = SimWorker(worker_id, model, events, on_step=on_step, chunks=chunks)
    events.workers.append(worker)
    return worker


requests = st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(1, 60), st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=20)


@settings(deadline=None)
@given(
    requests,
    st.integers(0, 3),
    st.integers(1, 3),
    st.sampled_from(Policy),
    st.sampled_from(RouterModel),
    st.none() | st.sampled_from(Chunks),
    st.booleans(),
    st.integers(14, 40),
    st.integers(1, 8),
    st.sampled_from([None, 3e4, 1e6]),
)
def test_simulation_loses_and_invents_nothing(
    chosen: list[tuple[float, int, int, int]],
    num_prefill: int,
    num_decode: int,
    policy: Policy,
    router_model: RouterModel,
    chunks: Chunks | None,
    decodes_first_token: bool,
    num_blocks: int,
    max_num_seqs: int,
    link_bytes_per_s: float | None,
) -> None:
    model = _model(decodes_first_token=decodes_first_token, num_blocks=num_blocks, max_num_seqs=max_num_seqs)
    planned = [_request(at_s, inputs, outputs, 100 * family) for at_s, inputs, outputs, family in sorted(chosen)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation_module, "Events", _CheckedEvents)
        patch.setattr(simulation_module, "SimWorker", _remembered_worker)
        simulation = _simulate(
            *planned,
            model=model,
            num_prefill=num_prefill,
            num_decode=num_decode,
            policy=policy,
            router_model=router_model,
            chunks=chunks,
            link_bytes_per_s=link_bytes_per_s,
        )
    moved = sum(record.kv_bytes for record in simulation.records)
    assert simulation.sent_bytes == pytest.approx(0.0 if link_bytes_per_s is None else moved)
    for record in simulation.records:
        times = [record.at_s, record.reserved_s, record.prefill_began_s, record.prefill_done_s, record.first_token_s]
        assert record.tail_s >= 0.0
        assert None not in [*times, record.finished_s]
        assert times == sorted(times, key=float)  # type: ignore[arg-type]
        assert record.first_token_s <= record.finished_s + 1e-9  # type: ignore[operator]
    for worker in simulation.workers:
        assert worker.pool.num_owned == worker.pool.num_quarantined == 0
        assert worker.pool.num_free + worker.pool.num_cached == num_blocks
        load = worker.load()
        assert load.num_running == load.num_waiting == load.uncomputed_prompt_tokens == 0
    if not sum(worker.num_preemptions for worker in simulation.workers):
        cached = sum(
            record.decode_cached_tokens if record.prefill_worker_id == record.decode_worker_id else record.prefill_cached_tokens
            for record in simulation.records
        )
        computed = sum(worker.num_prefill_tokens for worker in simulation.workers)
        assert computed + cached == sum(request.input_tokens for request in planned)
        by_decode = sum(request.output_tokens - (0 if decodes_first_token else 1) for request in planned)
        assert sum(worker.num_decode_tokens for worker in simulation.workers) == by_decode


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3)), min_size=1, max_size=25), st.integers(1, 3))
def test_round_robin_when_requests_do_not_overlap_reuses_what_the_ceiling_says(chosen: list[tuple[int, int]], num_prefill: int) -> None:
    # Whole blocks: a ceiling knows nothing of the room that a partly filled one takes.
    planned = tuple(_request(10.0 * i, BLOCK * blocks, 2, 100 * family) for i, (blocks, family) in enumerate(chosen))
    records = _simulate(*planned, num_prefill=num_prefill, num_decode=num_prefill, policy=Policy.ROUND_ROBIN).records
    schedule = Schedule(block_size=BLOCK, requests=planned, source="test")
    reused = sum(record.prefill_cached_tokens for record in records) / sum(record.input_tokens for record in records)
    assert reused == pytest.approx(ceilings(schedule, num_pools=num_prefill, blocks_per_pool=20).round_robin)


@settings(deadline=None, max_examples=20)
@given(requests, st.sampled_from(Policy))
def test_simulation_when_repeated_is_the_same(chosen: list[tuple[float, int, int, int]], policy: Policy) -> None:
    planned = [_request(at_s, inputs, outputs, 100 * family) for at_s, inputs, outputs, family in sorted(chosen)]
    runs = [_simulate(*planned, num_prefill=2, num_decode=2, policy=policy).records for _ in range(2)]
    assert runs[0] == runs[1]


def test_command_prints_one_json_object_and_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 100 * i, "input_length": 1500, "output_length": 20, "hash_ids": [0, 1, 2 + i]} for i in range(30)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["sim", str(trace), "--worker-model", "declared", "--prefill", "2", "--decode", "2", "--json"]
    for policy in Policy:
        result = CliRunner().invoke(app, [*arguments, "--policy", policy])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["requests"] == {
            "offered": 30,
            "completed": 30,
            "refused": 0,
            "prefilled_on_decode": report["requests"]["prefilled_on_decode"],
        }
        assert 0.5 < report["prefix_reuse"] + report["decode_reuse"] <= report["ceilings"]["infinite"]
        assert set(report["ttft_ms"]) == set(report["tpot_ms"]) == {"mean", "p50", "p90", "p99"}
    result = CliRunner().invoke(app, ["sim", str(tmp_path / "missing.jsonl")])
    assert result.exit_code == 2
    assert "missing.jsonl" in result.stderr


def test_command_when_a_result_is_asked_for_writes_what_a_run_would(tmp_path: Path) -> None:
    arguments = ["sim", "generated", "--requests", "200", "--prefill", "2", "--decode", "2", "--max-model-len", "50000", "--json"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.output)
    found, records = load_result(tmp_path / "r.json")
    assert found.kind == "sim" and found.verdict.valid and found.schedule.digest == printed["schedule_sha256"]
    assert found.summary.completed == printed["requests"]["completed"] == len(records)
    assert found.summary.ttft_ms is not None and found.summary.ttft_ms.p90 == pytest.approx(printed["ttft_ms"]["p90"])
    assert found.summary.prefix_reuse == pytest.approx(printed["prefix_reuse"])
    assert found.summary.decode_reuse == pytest.approx(printed["decode_reuse"])
    # In virtual time nothing is lost between stages.
    for record in records:
        assert record.e2e_s is not None and sum(record.stages.values()) == pytest.approx(record.e2e_s, abs=1e-9)
        assert min(record.stages.values()) >= -1e-9
    assert "Where the time goes" in (tmp_path / "r.html").read_text()


def test_command_when_the_workload_is_of_texts_refuses_it(tmp_path: Path) -> None:
    texts = tmp_path / "t.jsonl"
    texts.write_text('{"prompt": "hello"}\n')
    result = CliRunner().invoke(app, ["sim", str(texts)])
    assert result.exit_code == 2 and "of texts nobody knows what they share" in result.output


def test_first_token_when_calls_take_time_waits_for_them_once_more_for_prefill() -> None:
    model = dataclasses.replace(declared(), decodes_first_token=False, overhead_s=0.25, remote_overhead_s=0.5)
    schedule = Schedule(block_size=512, requests=(_request(0.0, 1024, 2, 0),), source="one")
    for num_prefill, expected_s in ((1, 0.75), (0, 0.25)):
        found = simulate(schedule, model, num_prefill=num_prefill, num_decode=1, policy=Policy.ROUND_ROBIN).records[0]
        assert found.prefill_done_s is not None and found.prefill_began_s is not None
        assert found.prefill_began_s == pytest.approx(expected_s)
        assert found.ttft_s == pytest.approx(expected_s + model.prefill.seconds(1024, 0))


def test_table_when_asked_for_has_both_policies_at_all_speedups() -> None:
    arguments = ["sim", "generated", "--requests", "60", "--prefill", "2", "--decode", "2", "--table"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)
    assert [(row["policy"], row["speedup"]) for row in rows] == [
        (policy, speed) for policy in ("round-robin", "baton") for speed in SPEEDUPS
    ]
    assert all(row["requests"]["completed"] == 60 for row in rows)
    assert rows[0]["virtual_s"] > rows[4]["virtual_s"]  # six times as fast
    printed = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}).output
    assert "round-robin" in printed and "Dynamo" not in printed  # whose figures are of another trace


def test_table_when_the_peer_s_figures_are_of_the_same_puts_them_beside_ours() -> None:
    values = {"mean": 1.0, "p50": 2.0, "p90": 3.0, "p99": 4.0}
    report = {"prefix_reuse": 0.5, "decode_reuse": 0.25, "ttft_ms": values, "tpot_ms": values}
    table, reports = policy_table(lambda policy, speedup: report, beside_dynamo=True)
    assert table.row_count == 2 * len(reports) == 4 * len(SPEEDUPS)
    assert set(DYNAMO) == {(policy, speedup) for policy in Policy for speedup in SPEEDUPS}
