"""Settings and checkpoint together: what does not fit is refused with its name and limit before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from services.core.errors import CheckpointError, InvalidRequest
from services.engine.loader import load_model
from services.engine.settings import DTYPES, KV_DTYPES, EngineSettings

CONTEXT_TOKENS, BLOCK_BYTES = 256, 4096  # of the checkpoint in conftest.py


def make_settings(**fields: Any) -> EngineSettings:
    return EngineSettings(**fields)


def test_validate_when_all_is_default_accepts() -> None:
    EngineSettings().validate()


@pytest.mark.parametrize("fields", [{"dtype": name} for name in DTYPES] + [{"block_size": 16}, {"block_size": 128}, {"max_model_len": 2}])
def test_validate_when_a_setting_is_inside_its_limits_accepts(fields: dict[str, Any]) -> None:
    make_settings(**fields).validate()


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("dtype", "int8", DTYPES),
        ("dtype", "", DTYPES),
        ("kv_dtype", "bfloat16", KV_DTYPES),
        ("block_size", 0, 1),
        ("block_size", -16, 1),
        ("block_size", 8, 16),
        ("block_size", 17, 16),
        ("kv_memory_bytes", 0, 1),
        ("max_num_seqs", 0, 1),
        ("max_num_requests", 0, 1),
        ("prefill_chunk_tokens", 0, 1),
        ("num_threads", 0, 1),
        ("max_model_len", 1, 2),
        ("max_model_len", 0, 2),
        ("max_model_len", -1, 2),
    ],
)
def test_validate_when_a_setting_is_outside_its_limits_raises_with_its_name_and_limit(field: str, value: Any, limit: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_settings(**{field: value}).validate()
    assert (caught.value.field, caught.value.limit) == (field, limit)
    assert repr(value) in caught.value.message


def test_load_model_when_settings_are_invalid_raises_before_it_looks_at_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="max_num_seqs"):
        load_model(tmp_path / "none", EngineSettings(max_num_seqs=0))


def test_load_model_when_max_model_len_is_beyond_the_checkpoint_raises(checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match="max_model_len: 257 is more than the checkpoint's 256") as caught:
        load_model(checkpoint, EngineSettings(max_model_len=CONTEXT_TOKENS + 1))
    assert caught.value.limit == CONTEXT_TOKENS


def test_load_model_when_the_pool_is_smaller_than_a_block_raises(checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match="kv_memory_bytes: 4095 is less than one sequence needs") as caught:
        load_model(checkpoint, EngineSettings(block_size=16, kv_memory_bytes=BLOCK_BYTES - 1))
    assert caught.value.limit == BLOCK_BYTES


def test_load_model_when_there_is_no_directory_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        load_model(tmp_path / "none", EngineSettings())


def test_load_model_when_memory_is_ample_takes_twice_what_all_sequences_could_fill(checkpoint: Path) -> None:
    core = load_model(checkpoint, EngineSettings(block_size=16, max_num_seqs=2, max_model_len=40)).core
    assert core.pool.num_blocks == 2 * 2 * 3
    assert core.max_model_len == 40


def test_load_model_when_settings_name_nothing_takes_the_checkpoint_s_facts(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, EngineSettings(block_size=16))
    assert (loaded.core.max_model_len, loaded.core.vocab_size) == (CONTEXT_TOKENS, 128)
    assert (loaded.dtype, loaded.generation.eos_token_ids) == (torch.float32, (2,))


def test_load_model_when_loaded_twice_has_one_prefix_key_and_another_after_a_weight_changes(checkpoint: Path, tmp_path: Path) -> None:
    keys = {load_model(checkpoint, EngineSettings(block_size=16)).core.prefix_key for _ in range(2)}
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    changed = load_model(tmp_path, EngineSettings(block_size=16)).core.prefix_key
    assert len(keys) == 1
    assert changed not in keys
