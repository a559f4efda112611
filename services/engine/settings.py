"""The engine's settings: what an operator may choose. Facts found at run time (how many blocks fit) are not here."""

from dataclasses import dataclass

from services.core.errors import InvalidRequest

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "fp8", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """
    device                 auto: cuda where PyTorch finds one, else cpu
    cuda_graphs            on cuda: steps that give every sequence one token are captured once and replayed
    batch_invariant        on cuda: a token has the same bits whatever it is batched with, however its prompt is cut and cached, so that no
                           speed-up changes one; slower. Workers with and without exchange no blocks
    dtype                  of activations; auto: on the CPU float32, in which no speed-up changes a token, on cuda the checkpoint's
    kv_dtype               of stored keys and values; auto: as activations. The others are lossy, with a scale for each token and head:
                           tokens are not those of another kv_dtype, and workers of different ones exchange no blocks
    max_model_len          longest sequence in tokens; None: what the checkpoint allows
    block_size             tokens per KV block
    kv_memory_bytes        size of the KV pool
    max_num_seqs           sequences computed in one step
    max_num_requests       requests taken in, running or waiting; one more is QueueFull
    prefill_chunk_tokens   prompt tokens computed in one step, over all requests
    num_threads            of torch
    """

    device: str = "auto"
    cuda_graphs: bool = True
    batch_invariant: bool = False
    dtype: str = "auto"
    kv_dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int = 64
    kv_memory_bytes: int = 1 << 30
    max_num_seqs: int = 64
    max_num_requests: int = 1024
    prefill_chunk_tokens: int = 512
    num_threads: int = 1

    def validate(self) -> None:
        """Raises InvalidRequest naming the first setting that is out of its limits."""
        for name, possible in (("device", DEVICES), ("dtype", DTYPES), ("kv_dtype", KV_DTYPES)):
            if (value := getattr(self, name)) not in possible:
                raise InvalidRequest(name, f"{value!r} is not one of {', '.join(possible)}", limit=possible)
        for name in ("block_size", "kv_memory_bytes", "max_num_seqs", "max_num_requests", "prefill_chunk_tokens", "num_threads"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, f"{getattr(self, name)} is less than 1", limit=1)
        if self.block_size % 16:
            raise InvalidRequest("block_size", f"{self.block_size} is not a multiple of 16", limit=16)
        if self.max_model_len is not None and self.max_model_len < 2:
            raise InvalidRequest("max_model_len", f"{self.max_model_len} is less than 2", limit=2)
