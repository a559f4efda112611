"""Refuses environments in which the tests would test something else; makes the checkpoints that several folders read."""

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

import services as services  # before gRPC, which reads what is set there
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


@pytest.fixture
def even_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter every element of a product is summed in the same order, as a GPU's tensor cores do it.

    The interpreter's own product is the processor's library's, in which a row's bits depend on where in the tile it is.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    def product(builder: Any, left: Any, right: Any, sums: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        total = np.zeros_like(sums.data)
        for number in range(left.data.shape[1]):
            total += left.data[:, number, None].astype(total.dtype) * right.data[number].astype(total.dtype)
        return interpreter.TensorHandle(total + sums.data, sums.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)
