"""What import contracts cannot say: what really gets loaded."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_core_when_no_package_is_installed_can_be_imported() -> None:
    modules = [f"services.core.{path.stem}" for path in (ROOT / "services" / "core").glob("*.py") if path.stem != "__init__"]
    assert len(modules) >= 4
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(modules)}"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True, cwd="/")


def test_command_line_and_tokenizer_when_imported_do_not_load_torch() -> None:
    program = "import sys, services.cli.app, services.tokenizer.tokenizer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
