"""The pool's memory from outside, and the fingerprint that says between which pools blocks may be copied."""

import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import BackendName, backend_of
from services.core.errors import InvalidRequest
from services.core.types import SamplingParams, TokenEvent
from services.engine.core import EngineCore
from services.engine.loader import load_model
from services.engine.model_config import load_model_config
from services.engine.model_runner import ModelRunner
from services.engine.models.decoder import Decoder
from services.engine.sequence import EngineRequest
from services.engine.settings import EngineSettings
from services.engine.weights import WeightReader
from tests.unit.engine.conftest import BLOCK_BYTES, HEAD_DIM, KV_HEADS, LAYERS

SETTINGS = EngineSettings(block_size=16, kv_memory_bytes=8 * BLOCK_BYTES + 1)
PROMPT = list(range(10, 50))


def generate(core: EngineCore) -> list[int | None]:
    core.add(EngineRequest(request_id="r", prompt_token_ids=PROMPT, sampling=SamplingParams(seed=1, max_tokens=20)))
    tokens = []
    while core.has_work:
        for event in core.step():
            assert isinstance(event, TokenEvent)
            tokens.append(event.token_id)
    return tokens


def test_load_model_when_given_memory_puts_the_pool_there_block_by_block(checkpoint: Path) -> None:
    """As a process does: a mapped memfd, which another process could map as well."""
    descriptor = os.memfd_create("kv")

    def allocate(regions: Sequence[tuple[int, int]]) -> mmap.mmap:
        assert regions == [(8, BLOCK_BYTES)]
        os.ftruncate(descriptor, 8 * BLOCK_BYTES)
        return mmap.mmap(descriptor, 8 * BLOCK_BYTES)

    core = load_model(checkpoint, SETTINGS, allocate_kv=allocate).core
    assert (core.pool.num_blocks, core.block_bytes, core.block_size) == (8, BLOCK_BYTES, 16)
    assert generate(core) == generate(load_model(checkpoint, SETTINGS).core)
    for block_id in core.pool.match_prefix(list(core.pool._block_of)):
        there = os.pread(descriptor, core.block_bytes, block_id * core.block_bytes)
        assert any(there)
        assert there == core._runner.pools[0][block_id].numpy().tobytes()
    os.close(descriptor)


def test_load_model_when_given_memory_that_is_larger_uses_its_beginning(checkpoint: Path) -> None:
    memory = bytearray(10 * BLOCK_BYTES)
    core = load_model(checkpoint, SETTINGS, allocate_kv=lambda *_: memory).core
    core._runner.pools[0].fill_(1.0)
    assert any(memory[8 * BLOCK_BYTES - 4 : 8 * BLOCK_BYTES])
    assert not any(memory[8 * BLOCK_BYTES :])


@pytest.mark.parametrize("memory", [bytearray(8 * BLOCK_BYTES - 1), memoryview(bytes(8 * BLOCK_BYTES))])
def test_load_model_when_given_memory_is_too_small_or_read_only_does_not_start(checkpoint: Path, memory: bytearray | memoryview) -> None:
    with pytest.raises(AssertionError):
        load_model(checkpoint, SETTINGS, allocate_kv=lambda *_: memory)


def fingerprint(checkpoint: Path, **settings: Any) -> bytes:
    fields: dict[str, Any] = {"block_size": 16, "kv_memory_bytes": 8 * BLOCK_BYTES}
    return load_model(checkpoint, EngineSettings(**{**fields, **settings})).core.layout_fingerprint


def test_layout_fingerprint_when_blocks_mean_the_same_is_equal_and_else_differs(checkpoint: Path, tmp_path: Path) -> None:
    here = fingerprint(checkpoint)
    assert len(here) == 32
    for settings in ({}, {"kv_memory_bytes": 20 * BLOCK_BYTES}, {"num_threads": 2}, {"max_model_len": 64}, {"max_num_seqs": 3}):
        assert fingerprint(checkpoint, **settings) == here
    others = [fingerprint(checkpoint, block_size=32), fingerprint(checkpoint, dtype="bfloat16"), fingerprint(checkpoint, dtype="float16")]
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    config["rope_theta"] = 20_000.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    others.append(fingerprint(tmp_path))
    others.extend(fingerprint(checkpoint, kv_dtype=kv_dtype) for kv_dtype in ("fp8", "int8", "int4"))
    assert len({here, *others}) == 8


def test_layout_fingerprint_in_batch_invariant_mode_is_another(checkpoint: Path) -> None:
    def found(name: BackendName) -> bytes:
        decoder = Decoder(
            load_model_config(checkpoint), WeightReader(checkpoint), dtype=torch.float32, max_model_len=64, backend=backend_of(name)
        )
        return ModelRunner(decoder, block_size=16, num_blocks=[8]).layout_fingerprint(b"m" * 32)

    assert found(BackendName.CPU) == found(BackendName.TRITON) != found(BackendName.TRITON_INVARIANT)
    assert len(found(BackendName.TRITON_INVARIANT)) == 32


def test_blocks_when_quantized_are_as_small_as_the_format_says(checkpoint: Path) -> None:
    cells = LAYERS * KV_HEADS * 16
    for kv_dtype, cell_bytes in (("auto", 8 * HEAD_DIM), ("fp8", 2 * HEAD_DIM + 4), ("int8", 2 * HEAD_DIM + 4), ("int4", HEAD_DIM + 4)):
        core = load_model(checkpoint, EngineSettings(block_size=16, kv_dtype=kv_dtype, kv_memory_bytes=40 * BLOCK_BYTES)).core
        assert core.block_bytes == cells * cell_bytes
        assert len(generate(core)) == 20


def test_load_model_when_int4_cannot_pair_a_head_s_numbers_says_so(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | {"head_dim": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(InvalidRequest, match="kv_dtype: int4 needs heads whose size 4 divides; the checkpoint's is 6"):
        load_model(tmp_path, EngineSettings(block_size=16, kv_dtype="int4"))


def test_model_fingerprint_when_only_the_layout_differs_is_the_same(checkpoint: Path) -> None:
    cores = [load_model(checkpoint, EngineSettings(block_size=size, kv_memory_bytes=8 * BLOCK_BYTES)).core for size in (16, 32)]
    assert cores[0].model_fingerprint == cores[1].model_fingerprint
    assert len(cores[0].model_fingerprint) == 32
