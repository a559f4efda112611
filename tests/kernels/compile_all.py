"""Compiles launches for GPUs that need not be there, a JSON line for each: `python -m tests.kernels.compile_all [everything]`."""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton

from tests.kernels.launches import everything, production, recorded

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program may have; CUDA's programming guide
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes of its stack, where spilled ones go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK")}  # type: ignore[union-attr]


def compiled(name: str, launch: Any, capability: int) -> dict[str, Any]:
    started = time.perf_counter()
    kernel = launch.compile(capability)
    return {
        "case": name,
        "kernel": launch.kernel.__name__,
        "capability": capability,
        "shared": kernel.metadata.shared,
        "wgmma": "wgmma" in kernel.asm["ptx"],
        **resources(kernel.asm["cubin"]),
        "seconds": round(time.perf_counter() - started, 1),
    }


def is_fit(found: dict[str, Any]) -> bool:
    """Whether nothing is spilled and the shared memory is there."""
    return not found["stack"] and found["shared"] <= SHARED_MEMORY[found["capability"]]


def main() -> None:
    cases = everything() if "everything" in sys.argv[1:] else production()
    all_fit = True
    for name, case in cases.items():
        for capability in SHARED_MEMORY:
            if "fp8" in name and capability < 89:
                continue  # has no instructions for it
            with recorded(capability) as launches:
                case()
            for launch in launches:
                found = compiled(name, launch, capability)
                all_fit &= is_fit(found)
                print(json.dumps(found), flush=True)
    sys.exit(0 if all_fit else "some spill registers, or need more shared memory than there is")


if __name__ == "__main__":
    main()
