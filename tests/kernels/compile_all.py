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

CAPABILITIES = (80, 90, 100)
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


def main() -> None:
    cases = everything() if "everything" in sys.argv[1:] else production()
    for name, case in cases.items():
        with recorded() as launches:
            case()
        for capability in CAPABILITIES:
            if "fp8" in name and capability < 89:
                continue  # has no instructions for it
            for launch in launches:
                print(json.dumps(compiled(name, launch, capability)), flush=True)


if __name__ == "__main__":
    main()
