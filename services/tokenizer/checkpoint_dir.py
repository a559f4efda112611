"""Where a checkpoint's files are: in a directory, or on the Hugging Face hub, downloaded once. The only file that knows the hub."""

import contextlib
from pathlib import Path

from services.core.errors import CheckpointError

DEMO = "demo"
# Weights in other formats, and other frameworks' files, would only cost time.
UNWANTED = ("original/*", "consolidated*")  # the same weights once more
WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def resolve_checkpoint(model: str, *, demo: Path) -> Path:
    """The directory of `model`: `demo` for the word "demo", an existing directory, else a hub repository ("owner/name").

    Raises CheckpointError when there is no such directory and the hub does not give one.
    """
    if model == DEMO:
        return demo
    with contextlib.suppress(RuntimeError):  # ~ of a user who is not there
        if (directory := Path(model).expanduser()).is_dir():
            return directory
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError("no such checkpoint directory", path=model)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except Exception as error:  # its own errors, those of its HTTP client and of its storage have no base in common
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"no such directory, and the hub does not give it: {reason}", path=model) from error
