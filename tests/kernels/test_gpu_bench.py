"""`make gpu` on a machine without a GPU: it says so, guesses nothing, and what it would run runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loadtest.micro.gpu import TARGETS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: run `make gpu`")


def run(*arguments: str) -> list[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "loadtest.micro.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_without_a_gpu_every_line_is_not_measured(tmp_path: Path) -> None:
    lines = run("--write", str(tmp_path / "figures.md"))
    assert lines[0] == "no NVIDIA GPU here: nothing was checked or measured"
    assert [line.split(" | ")[2] for line in lines[4:]] == ["not measured"] * len(TARGETS)
    assert not (tmp_path / "figures.md").exists()


def test_tiny_in_the_interpreter_every_line_runs_and_every_check_is_right() -> None:
    lines = run("--tiny")
    assert {line.split()[0] for line in lines if not line.startswith("|")} == {"right"}
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert [(name, target) for name, target, *_ in table[2:]] == list(TARGETS.items())
    assert {measured.strip(" |") for _, _, measured, *_ in table[2:]} == {"runs"}
