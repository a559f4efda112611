"""Refuses environments in which the tests would test something else."""

import importlib.metadata

import pytest


def pytest_configure(config: pytest.Config) -> None:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    # Hugging Face's package of that name and our folder shadow each other, depending on the path.
    raise pytest.UsageError("the distribution 'kernels' is installed here, which has the name of our folder: pip uninstall kernels")
