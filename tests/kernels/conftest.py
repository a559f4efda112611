"""What the kernel tests share."""

from collections.abc import Callable, Iterator

import pytest
import torch

SetThreads = Callable[[int], None]


@pytest.fixture
def torch_threads() -> Iterator[SetThreads]:
    """Sets PyTorch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
