"""From a checkpoint directory to an engine that can run: the one place where all the engine's parts are put together."""

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import Backend, KVFormat, KVLayout, backend_for
from services.core.errors import CheckpointError, InvalidRequest
from services.engine.core import EngineCore
from services.engine.decode_graphs import capture_graph
from services.engine.kv_groups import KVGroups
from services.engine.model_config import GenerationDefaults, ModelConfig, load_generation_defaults, load_model_config
from services.engine.model_runner import ModelRunner
from services.engine.models.decoder import Decoder
from services.engine.settings import EngineSettings
from services.engine.weights import WeightReader

# Compute capabilities of GPUs whose programs may have 99 KiB; those for data centres have 163 and more.
SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0))


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
    allocate_kv: Callable[[Sequence[tuple[int, int]]], memoryview | mmap.mmap | bytearray] | None = None,
    backend: Backend | None = None,
) -> LoadedModel:
    """Loads a checkpoint.

    allocate_kv   makes the KV pools' memory from (number of blocks, bytes of each) of one pool after another: zeroed, writable, block after
                  block. None: torch does
    backend       what computes the tensor functions; None: the fastest for the device
    Raises CheckpointError for what is wrong with the checkpoint and InvalidRequest for settings that do not fit it.
    """
    settings.validate()
    if not directory.is_dir():
        raise CheckpointError("no such checkpoint directory", path=str(directory))
    torch.set_num_threads(settings.num_threads)
    config = load_model_config(directory)
    generation = load_generation_defaults(directory, config)
    device = choose_device(settings.device)
    if settings.batch_invariant and device.type != "cuda" and backend is None:
        raise InvalidRequest("batch_invariant", "is for device cuda; on the CPU float32, the default, keeps tokens apart from their batch")
    reader = WeightReader(directory, device)
    dtype = choose_dtype(settings.dtype, config, device)
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
    if device.type == "cuda":
        check_cuda(settings, config, kv_format, torch.cuda.get_device_capability(device))
    decoder = Decoder(
        config,
        reader,
        dtype=dtype,
        max_model_len=max_model_len,
        kv_format=kv_format,
        backend=backend or backend_for(device, batch_invariant=settings.batch_invariant),
    )
    num_blocks = share_kv_memory(config.group_windows, decoder.kv_layouts(settings.block_size), settings, max_model_len=max_model_len)
    kv_buffer = None
    if allocate_kv:
        sizes = [layout.block_bytes for layout in decoder.kv_layouts(settings.block_size)]
        kv_buffer = memoryview(allocate_kv(list(zip(num_blocks, sizes, strict=True))))
    runner = ModelRunner(decoder, block_size=settings.block_size, num_blocks=num_blocks, kv_buffer=kv_buffer)
    if device.type == "cuda" and settings.cuda_graphs:
        runner.capture_decodes(max_num_seqs=settings.max_num_seqs, max_model_len=max_model_len, capture=capture_graph)
    core = EngineCore(
        runner,
        settings,
        model_fingerprint=reader.fingerprint(),
        eos_token_ids=generation.eos_token_ids,
        # A sequence that fills the whole pool can still run, alone; a longer one never could. Groups with windows have room for any.
        max_model_len=max_model_len if config.group_windows[0] else min(max_model_len, num_blocks[0] * settings.block_size),
    )
    core.calibrate()
    return LoadedModel(core=core, config=config, generation=generation, dtype=dtype)


def share_kv_memory(
    windows: tuple[int | None, ...], layouts: Sequence[KVLayout], settings: EngineSettings, *, max_model_len: int
) -> list[int]:
    """How many blocks each KV group's pool has, within settings.kv_memory_bytes.

    More blocks than twice what all sequences of a batch could fill at full length would never be used: the second half is prefix cache.
    Where the memory is less than that, groups with windows get what a batch can fill, but no more than half of it all: a sequence has a
    bounded number of blocks there, and any number in the group that keeps all tokens, which gets the rest.
    Raises InvalidRequest when a single sequence would not find room.
    """
    groups = KVGroups(windows, settings.block_size)
    longest = groups.num_blocks(max_model_len)
    # What one sequence can fill; the least with which one can run.
    chunk = min(settings.prefill_chunk_tokens, max_model_len)
    most = [min(longest, groups.most_blocks(group, chunk) or longest) for group in range(len(layouts))]
    least = [1 if window is None else number for window, number in zip(groups.windows, most, strict=True)]
    sizes = [layout.block_bytes for layout in layouts]
    left = settings.kv_memory_bytes - sum(size * number for size, number in zip(sizes, least, strict=True))
    if left < 0:
        needed = settings.kv_memory_bytes - left
        raise InvalidRequest("kv_memory_bytes", f"{settings.kv_memory_bytes} is less than one sequence needs", limit=needed)
    num_blocks = list(least)
    # In rounds: a batch's windows, then all tokens with their prefix cache, then the windows' prefix cache.
    for batches, has_window, part in ((1, True, 0.5), (2, False, 1.0), (2, True, 1.0)):
        for group, window in enumerate(groups.windows):
            if (window is not None) is has_window:
                wanted = batches * settings.max_num_seqs * most[group] - num_blocks[group]
                share = left if len(layouts) == 1 else int(left * part)
                taken = max(0, min(wanted, share // sizes[group]))
                num_blocks[group] += taken
                left -= taken * sizes[group]
    return num_blocks


def choose_device(requested: str) -> torch.device:
    """Where the model is. Raises InvalidRequest for a device that this machine lacks."""
    has_cuda = torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise InvalidRequest("device", "is cuda, but PyTorch finds no NVIDIA GPU here")
    return torch.device("cuda" if has_cuda and requested != "cpu" else "cpu")


def check_cuda(settings: EngineSettings, config: ModelConfig, kv_format: KVFormat, capability: tuple[int, int]) -> None:
    """Raises InvalidRequest for what the kernels cannot do on a GPU of this compute capability."""
    if settings.block_size & (settings.block_size - 1):
        raise InvalidRequest("block_size", f"{settings.block_size} is not a power of two, as it must be on cuda")
    if capability in SMALL_SHARED_MEMORY and (config.latent is not None or config.head_dim > 128):
        have = ".".join(map(str, capability))
        raise InvalidRequest("device", f"compute capability {have} has too little shared memory for latents, or heads of more than 128")
    if kv_format is KVFormat.FP8 and capability < (8, 9):
        have = ".".join(map(str, capability))
        raise InvalidRequest("kv_dtype", f"fp8 needs a GPU of compute capability 8.9 or later; this one has {have}. Take int8")


def choose_dtype(requested: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of activations and KV. On the CPU only fp32 keeps the tokens of a prompt apart from how it was cut and batched.

    bf16 rounds away what sums in another order differ by, or does not: of 40 greedy prompts 10 gave other tokens warm than cold. Weights
    keep the checkpoint's two bytes either way, and fp32 was the faster one even on a processor that multiplies bf16.
    """
    automatic: torch.dtype = getattr(torch, config.dtype) if device.type == "cuda" else torch.float32
    names = {"auto": automatic, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return names[requested]
