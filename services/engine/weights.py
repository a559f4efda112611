"""Reads a checkpoint's tensors from (sharded) safetensors files, and accounts for every one of them.

A reader hands out tensors by name and remembers which; a name that is missing, has another shape or is left over is an error.
Knows nothing of what the tensors mean. Source: the safetensors format and the index file of Hugging Face transformers.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from services.core.errors import CheckpointError
from services.engine.config_fields import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Old checkpoints carry this table, which everyone computes from the configuration.
CPU = torch.device("cpu")
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq$")


class WeightReader:
    """The tensors of one checkpoint directory. Raises CheckpointError for files that are missing, unreadable or inconsistent."""

    def __init__(self, directory: Path, device: torch.device = CPU) -> None:
        """`device`: where read() puts tensors."""
        self._directory = directory
        self.device = device
        if (directory / INDEX_NAME).exists():
            weight_map = read_json(directory / INDEX_NAME).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError("weight_map: is missing or empty", path=str(directory / INDEX_NAME))
            self.files = [directory / name for name in sorted(set(weight_map.values()))]
        elif (directory / SINGLE_NAME).exists():
            weight_map = None
            self.files = [directory / SINGLE_NAME]
        else:
            raise CheckpointError(f"has neither {SINGLE_NAME} nor {INDEX_NAME}", path=str(directory))
        self._handles: dict[str, Any] = {}  # tensor name → open file
        for path in self.files:
            handle = _open(path)
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                if name in self._handles:
                    raise CheckpointError(f"tensor {name} is in another shard as well", path=str(path))
                self._handles[name] = handle
        if weight_map is not None and (lacking := sorted(set(weight_map) - set(self._handles))):
            raise CheckpointError(f"the index lists {_some(lacking)}, which no shard has", path=str(directory / INDEX_NAME))
        self._unread = {name for name in self._handles if not _DERIVED.match(name)}

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The tensor in its stored dtype. Raises CheckpointError when it is missing or has another shape."""
        if name not in self._handles:
            raise CheckpointError(f"weight {name} is missing", path=str(self._directory))
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"weight {name} has shape {list(tensor.shape)}, the configuration says {list(shape)}", path=str(self._directory)
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"weight {name} has dtype {tensor.dtype}, which is not supported", path=str(self._directory))
        self._unread.discard(name)
        return tensor.to(self.device)

    def skip(self, name: str) -> None:
        """Marks a tensor as knowingly not used."""
        self._unread.discard(name)

    def finish(self) -> None:
        """Raises CheckpointError if a tensor was never read: the model would silently lack a part of itself."""
        if self._unread:
            raise CheckpointError(f"weights left over: {_some(sorted(self._unread))}", path=str(self._directory))

    def fingerprint(self) -> bytes:
        """32 bytes that stand for the content of config.json and of every weight file."""
        digest = hashlib.sha256()
        for path in (self._directory / "config.json", *self.files):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.digest()


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError("no such file", path=str(path)) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"not readable as safetensors ({error})", path=str(path)) from None


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
