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


def printed_by(module: str) -> list[dict[str, Any]]:
    """What a module prints that compiles, which a process with Triton's interpreter cannot."""
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-m", module], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.endswith("}\n"), result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_production_kernels_compile_and_fit_every_generation() -> None:
    """One test, for a worker of its own would compile everything again."""
    found = printed_by("tests.kernels.compile_all")
    print(f"{len(found)} kernels compiled in {sum(one['seconds'] for one in found):.0f} s")
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


def test_attention_in_batch_invariant_mode_is_the_same_kernel_for_a_token_and_for_a_prompt() -> None:
    """Or a token's sums would be rounded otherwise amid a prompt, which no interpreter shows."""
    launches = printed_by("tests.kernels.launches")
    assert {launch.pop("PART_ROWS") for launch in launches} == {4, 64}  # rows that are kept of a tile; all are computed
    assert {launch["HAS_WINDOW"] for launch in launches} == {False, True}
    for has_window in (False, True):
        kernels = [launch for launch in launches if launch["HAS_WINDOW"] is has_window]
        assert len(kernels) >= 2 and all(kernel == kernels[0] for kernel in kernels)
    # Nothing is fused into a sum: the loops that mask would do it otherwise than those that do not.
    assert all(launch["INVARIANT"] and launch["BLOCK_M"] == 64 and launch["enable_fp_fusion"] is False for launch in launches)
