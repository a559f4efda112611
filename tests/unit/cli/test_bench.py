"""`baton bench profile`: what it measures is a real engine, and what it writes the simulator reads."""

import math
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from loadtest.files import BadInput
from loadtest.sim.worker_model import Chunk, fitted
from services.cli.app import app
from services.cli.worker_profile import WorkerProfile, profile_worker
from services.core.errors import InvalidRequest
from services.engine.demo import TARGET_DIR
from services.engine.loader import load_model
from services.engine.settings import EngineSettings


@pytest.fixture(scope="module")
def profile() -> WorkerProfile:
    settings = EngineSettings(max_model_len=256, block_size=16, kv_memory_bytes=8 << 20, max_num_seqs=4, prefill_chunk_tokens=64)
    core = load_model(TARGET_DIR, settings).core
    found = profile_worker(core, rounds=1, hardware="here", model="demo")
    stats = core.stats()
    assert stats.blocks_owned == stats.num_running == stats.num_waiting == 0
    return found


def test_profile_of_a_real_engine_says_what_it_is_and_how_well_the_shapes_fit(profile: WorkerProfile) -> None:
    assert (profile.block_size, profile.max_num_seqs) == (16, 4)
    assert profile.num_blocks * profile.block_bytes <= 8 << 20
    assert profile.chunk_tokens <= 64
    for fit in (profile.prefill, profile.decode):
        assert fit.num_kinds >= 4
        assert all(math.isfinite(seconds) and seconds >= 0.0 for seconds in fit.seconds)
        assert 0.0 <= fit.median_error <= fit.p90_error


def test_profile_when_the_simulator_reads_it_gives_steps_of_the_fitted_seconds(profile: WorkerProfile, tmp_path: Path) -> None:
    path = tmp_path / "worker.json"
    path.write_text(profile.to_json())
    model = fitted(path)
    constant_s, per_token_s, per_pair_s = profile.prefill.seconds
    both = constant_s + 30 * per_token_s + per_pair_s * (10 * 10 + 20 * (20 + 2 * 16))
    assert model.step_s([Chunk(10, 0), Chunk(20, 16)], 0, 0.0) == pytest.approx(both)
    constant_s, per_sequence_s, per_block_s = profile.decode.seconds
    assert model.step_s([], 3, 5.5) == pytest.approx(constant_s + 3 * per_sequence_s + 5.5 * per_block_s)
    assert not model.decodes_first_token
    assert (model.block_size, model.num_blocks, model.chunk_tokens) == (16, profile.num_blocks, profile.chunk_tokens)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [("format", "baton.worker/9", "format"), ("block_size", 0, "block_size"), ("prefill", {"seconds": [-1.0, 0, 0]}, "prefill.seconds")],
)
def test_profile_when_a_field_cannot_be_is_refused_by_its_name(
    profile: WorkerProfile, tmp_path: Path, field: str, value: object, named: str
) -> None:
    path = tmp_path / "worker.json"
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(profile.to_json()), field: value}))
    with pytest.raises(BadInput, match=rf"worker\.json.*{named}"):
        fitted(path)


def test_profile_when_steps_take_no_time_is_refused(profile: WorkerProfile, tmp_path: Path) -> None:
    path = tmp_path / "worker.json"
    nothing = {"seconds": [0.0, 0.0, 1.0]}
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(profile.to_json()), "decode": nothing}))
    with pytest.raises(BadInput, match=r"decode\.seconds"):
        fitted(path)
    with pytest.raises(BadInput, match="missing"):
        fitted(tmp_path / "missing.json")


def test_bench_when_the_file_s_directory_is_missing_says_so_before_it_measures(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "profile", "-o", str(tmp_path / "none" / "worker.json")])
    assert isinstance(result.exception, InvalidRequest)
    assert "none is no directory" in result.exception.message


def test_profile_of_processes_is_fitted_to_what_they_took_and_keeps_the_engine_s(profile: WorkerProfile, tmp_path: Path) -> None:
    prefill = [((1.0, float(n), float(n * n)), 0.002 + n * 1e-4 + n * n * 1e-8) for n in (16, 32, 64, 128, 256, 512)]
    decode = [((1.0, float(size), 4.0 * size), 0.001 + size * 3e-4) for size in (1, 2, 4, 8)]
    found = profile.in_processes(prefill=prefill, decode=decode, overheads_s=[0.004, 0.005, 0.9], remote_overheads_s=[0.001, 0.003, 0.002])
    assert (found.engine_prefill, found.engine_decode) == (profile.prefill, profile.decode)
    assert found.prefill.seconds == pytest.approx((0.002, 1e-4, 1e-8), rel=0.2)
    assert found.prefill.median_error < 0.02 and found.decode.median_error < 0.02
    path = tmp_path / "worker.json"
    path.write_text(found.to_json())
    model = fitted(path)
    # Medians: one stall is no more telling than any other observation.
    assert (model.overhead_s, model.remote_overhead_s) == (0.005, 0.002)
