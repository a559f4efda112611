"""Echo with logprobs, as evaluation harnesses score a prompt: the numbers of transformers, on the demo model in fp32.

transformers runs in a process of its own, outside of this repository: it would take our `kernels` folder for its optional dependency.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from services.engine.demo import TARGET_DIR
from tests.mesh import Mesh

PROMPTS = ["def read_json(path):\n    with open(path) as file:\n        return json.load(file)\n", "import os\nimport sys\n", "a ≠ b"]
REFERENCE = """
import json, sys
sys.modules["kernels"] = None
import torch, transformers
directory, prompts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
with torch.inference_mode():
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        top = logprobs.max(-1).values.tolist()
        print(json.dumps([logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist(), top]))
"""


def reference(folder: Path) -> list[Any]:
    """For each prompt the logprob of each token but the first, and of the likeliest one in its place."""
    process = subprocess.run(
        [sys.executable, "-I", "-c", REFERENCE, str(TARGET_DIR), json.dumps(PROMPTS)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_when_echoed_with_logprobs_has_those_of_transformers(tmp_path: Path, stream: bool) -> None:

    async def main() -> None:
        async with Mesh("demo", dtype="float32") as mesh:
            router = await mesh.router([await mesh.prefill("p0"), await mesh.decode("d0")], http=True, max_local_tokens=0)
            async with openai.AsyncOpenAI(base_url=f"http://{mesh.http_address(router)}/v1", api_key="none", max_retries=0) as client:
                # Twice: what a cache holds of a prompt must not cost it its scores.
                for max_tokens in (0, 1):
                    asked: Any = {"model": "demo", "prompt": PROMPTS, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
                    columns: dict[int, tuple[list[Any], list[Any]]] = {index: ([], []) for index in range(len(PROMPTS))}
                    answers = [chunk async for chunk in await client.completions.create(**asked, stream=True)] if stream else []
                    for answer in answers or [await client.completions.create(**asked)]:
                        for choice in answer.choices:
                            if choice.logprobs is not None:
                                columns[choice.index][0].extend(choice.logprobs.token_logprobs or [])
                                columns[choice.index][1].extend(choice.logprobs.top_logprobs or [])
                    for index, (chosen, best) in enumerate(wanted):
                        logprobs, top = columns[index]
                        assert logprobs[0] is None and top[0] is None
                        assert len(logprobs) == 1 + len(chosen) + max_tokens
                        assert logprobs[1 : 1 + len(chosen)] == pytest.approx(chosen, abs=1e-3)
                        assert [max(entry.values()) for entry in top[1 : 1 + len(best)]] == pytest.approx(best, abs=1e-3)

    wanted = reference(tmp_path)
    asyncio.run(main())
