"""Workloads with what each of their requests gives alone; the end of a run says how many comparisons stopped at a near tie."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels import KVFormat
from services.core.types import SamplingParams
from services.engine.model_config import load_model_config
from services.engine.models.decoder import Decoder
from services.engine.weights import WeightReader
from tests.checkpoints import FAMILIES
from tests.exactness.workloads import GREEDY, MAX_MODEL_LEN, SAMPLED, Workload, make_requests, run_alone

# Name → (checkpoint, format of keys and values, number of requests, kinds of sampling, shortest prompt). Mistral's prompts are longer than
# its window of 50.
WORKLOADS: dict[str, tuple[str, KVFormat, int, tuple[SamplingParams, ...], int]] = {
    "greedy": ("llama3", KVFormat.PLAIN, 100, GREEDY, 1),
    "sampled": ("llama3", KVFormat.PLAIN, 100, SAMPLED, 1),
    "window": ("mistral", KVFormat.PLAIN, 16, (GREEDY[0], *SAMPLED), 60),
    "gemma": ("gemma3", KVFormat.PLAIN, 16, (GREEDY[0], *SAMPLED), 60),
    "latent": ("deepseek", KVFormat.PLAIN, 16, (GREEDY[0], *SAMPLED), 1),
    "bf16": ("llama3_bf16", KVFormat.PLAIN, 16, (GREEDY[1], *SAMPLED), 1),
    "fp8": ("llama3", KVFormat.FP8, 16, (GREEDY[0], *SAMPLED), 1),
    "int8": ("llama3", KVFormat.INT8, 16, (GREEDY[0], *SAMPLED), 1),
    "int4": ("llama3", KVFormat.INT4, 16, (GREEDY[0], *SAMPLED), 1),
}
NEAR_TIES = "near ties"


@pytest.fixture(scope="session")
def load_workload(checkpoints: Path) -> Callable[[str], Workload]:
    """A workload of WORKLOADS by name. Computes in fp32, whatever the processor would choose: law 3 is held to identity there."""
    loaded: dict[str, Workload] = {}

    def load(name: str) -> Workload:
        if name not in loaded:
            checkpoint, kv_format, num_requests, kinds, shortest = WORKLOADS[name]
            directory = checkpoints / checkpoint
            config, reader = load_model_config(directory), WeightReader(directory)
            decoder = Decoder(config, reader, dtype=torch.float32, max_model_len=MAX_MODEL_LEN, kv_format=kv_format)
            requests = make_requests(
                vocab_size=int(FAMILIES[checkpoint][1]["vocab_size"]), num_requests=num_requests, kinds=kinds, seed=1, shortest=shortest
            )
            loaded[name] = Workload(decoder=decoder, requests=requests, baseline=run_alone(decoder, requests))
        return loaded[name]

    return load


@pytest.fixture(scope="session", params=WORKLOADS)
def workload(request: pytest.FixtureRequest, load_workload: Callable[[str], Workload]) -> Workload:
    return load_workload(request.param)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == NEAR_TIES:
                terminalreporter.write_line(f"exactness: {value}")
