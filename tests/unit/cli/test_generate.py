"""`baton generate --local` as a user runs it: a process of its own, on the demo model that ships."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "services.cli", "generate", *arguments]


def generate(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=120)


def test_generate_when_seeded_repeats_its_text_and_tells_seed_and_speed() -> None:
    arguments = ("--local", "def read_json(", "--max-tokens", "24", "--seed", "7", "--ignore-eos", "--served-model-name", "demo")
    first, second = generate(*arguments), generate(*arguments)
    assert first.returncode == 0
    assert first.stdout == second.stdout
    assert len(first.stdout) > 24
    assert "[demo, " in first.stderr
    assert "24 new" in first.stderr
    assert "seed 7" in first.stderr


def test_generate_when_the_prompt_comes_from_standard_input_reads_it_all() -> None:
    piped = generate("--local", "-", "--max-tokens", "8", "--temperature", "0", stdin="import os\nimport ")
    given = generate("--local", "import os\nimport ", "--max-tokens", "8", "--temperature", "0")
    assert piped.returncode == 0
    assert piped.stdout == given.stdout


def test_generate_when_several_choices_are_asked_for_prints_each() -> None:
    result = generate("--local", "class A", "--n", "3", "--max-tokens", "5", "--seed", "1")
    assert result.returncode == 0
    assert all(f"── choice {choice} (" in result.stdout for choice in range(3))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--local", ""), 2, "error: prompt: is empty"),
        (("--local", "--token-ids", "1,4096"), 2, "error: prompt: token id 4096 is outside the vocabulary of 4096"),
        (("--local", "--token-ids", "1,x"), 2, "error: --token-ids: '1,x' is not a list of integers"),
        (("--local", "x " * 5000), 2, "the model takes 4096 with at least one new token"),
        (("--local", "x", "--temperature", "nan"), 2, "error: temperature: nan is outside [0.0, 100.0]"),
        (("--local", "x", "--max-tokens", "4096"), 2, "error: max_tokens: 4096 new tokens after a prompt of 1 exceed the model's 4096"),
        (("--local", "x", "--dtype", "int8"), 2, "error: dtype: 'int8' is not one of auto, float32, bfloat16, float16"),
        (("--local", "x", "--max-model-len", "4097"), 2, "error: max_model_len: 4097 is more than the checkpoint's 4096"),
        (("--local", "x", "--model", "nowhere"), 1, "error: nowhere: no such checkpoint directory"),
        (("--local", "x", "--model", "tests"), 1, "error: tests/config.json: no such file"),
    ],
)
def test_generate_when_the_input_is_bad_says_so_in_one_line(arguments: tuple[str, ...], status: int, message: str) -> None:
    result = generate(*arguments)
    assert result.returncode == status
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_generate_when_interrupted_ends_at_once_with_what_it_made() -> None:
    arguments = command("--local", "import os", "--max-tokens", "4000", "--ignore-eos")

    def heed_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background of a shell ignores them

    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)  # the first token is there
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        errors = process.stderr.read().decode()
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in errors
    made = re.search(r"(\d+) new in", errors)
    assert made is not None
    assert int(made[1]) < 4000
