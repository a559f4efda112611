"""From a checkpoint directory to an engine that can run: the one place where all the engine's parts are put together."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import Backend, KVFormat
from services.core.errors import CheckpointError, InvalidRequest
from services.engine.core import EngineCore
from services.engine.model_config import GenerationDefaults, ModelConfig, load_generation_defaults, load_model_config
from services.engine.model_runner import ModelRunner
from services.engine.models.decoder import Decoder
from services.engine.settings import EngineSettings
from services.engine.weights import WeightReader


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """An engine core with what its front end must know of the checkpoint."""

    core: EngineCore
    config: ModelConfig
    generation: GenerationDefaults
    dtype: torch.dtype


def load_model(
    directory: Path,
    settings: EngineSettings,
    *,
    allocate_kv: Callable[[int, int], memoryview | mmap.mmap | bytearray] | None = None,
    backend: Backend | None = None,
) -> LoadedModel:
    """Loads a checkpoint.

    allocate_kv   makes the KV pool's memory from (number of blocks, bytes of each): zeroed, writable, block after block. None: torch does
    backend       what computes the tensor functions; None: the CPU's, the only one that all of the engine runs on so far
    Raises CheckpointError for what is wrong with the checkpoint and InvalidRequest for settings that do not fit it.
    """
    settings.validate()
    if not directory.is_dir():
        raise CheckpointError("no such checkpoint directory", path=str(directory))
    torch.set_num_threads(settings.num_threads)
    config = load_model_config(directory)
    generation = load_generation_defaults(directory, config)
    reader = WeightReader(directory)
    dtype = choose_dtype(settings.dtype)
    max_model_len = settings.max_model_len or config.context_tokens
    if max_model_len > config.context_tokens:
        raise InvalidRequest(
            "max_model_len", f"{max_model_len} is more than the checkpoint's {config.context_tokens}", limit=config.context_tokens
        )
    kv_format = KVFormat.PLAIN if settings.kv_dtype == "auto" else KVFormat[settings.kv_dtype.upper()]
    if kv_format is not KVFormat.PLAIN and config.latent:
        raise InvalidRequest("kv_dtype", f"{settings.kv_dtype!r} is not for latents; only 'auto' is")
    if kv_format is KVFormat.INT4 and config.head_dim % 4:
        raise InvalidRequest("kv_dtype", f"int4 needs heads whose size 4 divides; the checkpoint's is {config.head_dim}")
    decoder = Decoder(config, reader, dtype=dtype, max_model_len=max_model_len, kv_format=kv_format, backend=backend)
    block_bytes = decoder.kv_layout(settings.block_size).block_bytes
    # More blocks than all sequences at full length could fill would never be used, except as prefix cache: twice that is plenty.
    most_blocks = 2 * settings.max_num_seqs * -(-max_model_len // settings.block_size)
    num_blocks = min(settings.kv_memory_bytes // block_bytes, most_blocks)
    if num_blocks < 1:
        raise InvalidRequest("kv_memory_bytes", f"{settings.kv_memory_bytes} is less than one block", limit=block_bytes)
    kv_buffer = memoryview(allocate_kv(num_blocks, block_bytes)) if allocate_kv else None
    runner = ModelRunner(decoder, block_size=settings.block_size, num_blocks=num_blocks, kv_buffer=kv_buffer)
    core = EngineCore(
        runner,
        settings,
        model_fingerprint=reader.fingerprint(),
        eos_token_ids=generation.eos_token_ids,
        # A sequence that fills the whole pool can still run, alone; a longer one never could.
        max_model_len=min(max_model_len, num_blocks * settings.block_size),
    )
    core.calibrate()
    return LoadedModel(core=core, config=config, generation=generation, dtype=dtype)


def choose_dtype(requested: str) -> torch.dtype:
    """The dtype of activations and KV. On the CPU only fp32 keeps the tokens of a prompt apart from how it was cut and batched.

    bf16 rounds away what sums in another order differ by, or does not: of 40 greedy prompts 10 gave other tokens warm than cold. Weights
    keep the checkpoint's two bytes either way, and fp32 was the faster one even on a processor that multiplies bf16.
    """
    names = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return names[requested]
