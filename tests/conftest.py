"""Refuses environments in which the tests would test something else; makes the checkpoints that several folders read."""

import importlib.metadata
import os
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.checkpoints import make_checkpoints

# Without a GPU, Triton's kernels run in its interpreter; it asks when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# On a shared machine an example may take as long as it likes; how fast something is, benchmarks tell.
hypothesis.settings.register_profile("shared", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("shared")


def pytest_configure(config: pytest.Config) -> None:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    # Hugging Face's package of that name and our folder shadow each other, depending on the path.
    raise pytest.UsageError("the distribution 'kernels' is installed here, which has the name of our folder: pip uninstall kernels")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of tests/checkpoints.py; with one thread, as on a shared machine."""
    torch.set_num_threads(1)
    return make_checkpoints(tmp_path_factory.getbasetemp())
