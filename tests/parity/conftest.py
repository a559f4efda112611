"""The checkpoints of tests/checkpoints.py, loaded once each."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.engine.model_config import load_model_config
from services.engine.models.decoder import Decoder
from services.engine.weights import WeightReader
from tests.checkpoints import CONTEXT_TOKENS
from tests.exactness.conftest import load_workload

__all__ = ["load_workload"]  # the mesh is held to the same baseline as the engine


@pytest.fixture(scope="session")
def load_decoder(checkpoints: Path) -> Callable[[str], Decoder]:
    """A checkpoint of FAMILIES by name, in fp32."""
    loaded: dict[str, Decoder] = {}

    def load(name: str) -> Decoder:
        if name not in loaded:
            config = load_model_config(checkpoints / name)
            loaded[name] = Decoder(config, WeightReader(checkpoints / name), dtype=torch.float32, max_model_len=CONTEXT_TOKENS)
        return loaded[name]

    return load
