"""What import contracts cannot say: what really gets loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_core_when_no_package_is_installed_can_be_imported() -> None:
    modules = [f"services.core.{path.stem}" for path in (ROOT / "services" / "core").glob("*.py") if path.stem != "__init__"]
    assert len(modules) >= 4
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(modules)}"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True, cwd="/")


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (["services.router.process"], ["torch", "transformers"]),
        (
            ["services.cli.app", "services.tokenizer.tokenizer", "services.kv_index.service", "services.mesh.kv_transport"],
            ["torch", "transformers", "numba", "llvmlite"],
        ),
    ],
)
def test_control_plane_when_imported_loads_nothing_heavy(modules: list[str], unwanted: list[str]) -> None:
    program = f"import sys, {', '.join(modules)}; sys.exit(any(name in sys.modules for name in {unwanted}))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
