"""The kernels as they are launched in production, compiled for three generations of GPUs on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program may have; CUDA's programming guide
# Tiles of 64 rows and more; what has fewer is computed by the older instruction, for the newer would waste most of it.
WARP_GROUP_PRODUCTS = ("prefill", "prefill by lists")


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_all"], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    print(f"{len(found)} kernels compiled in {sum(one['seconds'] for one in found):.0f} s")
    return found


def test_every_kernel_is_compiled_for_every_generation(compiled: list[dict[str, Any]]) -> None:
    kernels = {one["kernel"] for one in compiled}
    assert kernels == {
        "plan_units",
        "decode_attention",
        "prefill_attention",
        "rope_and_write_kv",
        "rms_norm",
        "silu_and_mul",
        "merge_attention",
        "copy_heads",
        "convert_heads",
    }
    for capability in SHARED_MEMORY:
        assert {one["kernel"] for one in compiled if one["capability"] == capability} == kernels


def test_no_kernel_spills_registers(compiled: list[dict[str, Any]]) -> None:
    assert [one for one in compiled if one["stack"]] == []


def test_no_kernel_needs_more_shared_memory_than_there_is(compiled: list[dict[str, Any]]) -> None:
    assert [one for one in compiled if one["shared"] > SHARED_MEMORY[one["capability"]]] == []


def test_large_products_are_those_of_warp_groups_on_hopper(compiled: list[dict[str, Any]]) -> None:
    on_hopper = {one["case"] for one in compiled if one["capability"] == 90 and one["wgmma"]}
    assert on_hopper == set(WARP_GROUP_PRODUCTS)
