"""The kernels as they are launched in production, compiled for three generations of GPUs on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.kernels.compile_all import SHARED_MEMORY

# Tiles of 64 rows and more; what has fewer is computed by the older instruction, for the newer would waste most of it.
WARP_GROUP_PRODUCTS = (
    "prefill",
    "prefill by lists",
    "prefill over expanded latents",
    "decode over latents, 128 heads",
    "verify over latents, 16 heads",
    "invariant decode",
    "invariant prompt",
    "invariant over latents",
    "invariant products",
)


def compiled() -> list[dict[str, Any]]:
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_all"], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.endswith("}\n"), result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    print(f"{len(found)} kernels compiled in {sum(one['seconds'] for one in found):.0f} s")
    return found


def test_production_kernels_compile_and_fit_every_generation() -> None:
    """One test, for a worker of its own would compile everything again."""
    found = compiled()
    kernels = {one["kernel"] for one in found}
    assert kernels == {
        "plan_units",
        "decode_attention",
        "prefill_attention",
        "rope_and_write_kv",
        "rope_and_write_latent",
        "rms_norm",
        "linear_kernel",
        "activate_and_mul",
        "merge_attention",
        "copy_heads",
        "convert_heads",
    }
    for capability, most in SHARED_MEMORY.items():
        here = [one for one in found if one["capability"] == capability]
        assert {one["kernel"] for one in here} == kernels
        assert [one for one in here if one["stack"]] == []  # where spilled registers would go
        assert [one for one in here if one["shared"] > most] == []
    on_hopper = {one["case"] for one in found if one["capability"] == 90 and one["wgmma"]}
    assert on_hopper == set(WARP_GROUP_PRODUCTS)
