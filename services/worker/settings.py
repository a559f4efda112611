"""Settings that prefill and decode workers share."""

from dataclasses import dataclass

from services.core.errors import InvalidRequest
from services.engine.settings import EngineSettings
from services.mesh.server import ProcessSettings

TRANSPORTS = ("shm", "tcp", "grpc")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings(ProcessSettings):
    """Beside EngineSettings' fields of the same names:

    model                checkpoint directory, or a name on the Hugging Face hub; "demo": the model that ships with Baton
    served_model_name    what clients call it; None: the directory's name
    worker_id            stable over restarts; None: role and address
    advertise            host under which others reach this worker; None: that of `listen`
    redis_url            where workers announce themselves; None: they are listed in the routers' settings
    namespace            of the mesh in Redis: its workers, routers and index have equal ones
    kv_index             addresses of index services, the owner and its standbys; none: nothing is published
    kv_transports        what may carry KV blocks, best first
    kv_port              TCP port of the KV data plane; 0 takes a free one
    """

    model: str = "demo"
    served_model_name: str | None = None
    worker_id: str | None = None
    advertise: str | None = None
    redis_url: str | None = None
    namespace: str = "default"
    kv_index: tuple[str, ...] = ()
    kv_transports: tuple[str, ...] = TRANSPORTS
    kv_port: int = 0
    device: str = "auto"
    cuda_graphs: bool = True
    batch_invariant: bool = False
    dtype: str = "auto"
    kv_dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int | None = None
    kv_memory_bytes: int = 1 << 28
    max_num_seqs: int = 64
    max_num_requests: int = 1024
    prefill_chunk_tokens: int = 512
    num_threads: int = 1

    def validate(self) -> None:
        """Raises InvalidRequest naming the first setting that is out of its limits."""
        ProcessSettings.validate(self)
        self.engine_settings().validate()
        unknown = [name for name in self.kv_transports if name not in TRANSPORTS]
        if unknown or not self.kv_transports:
            raise InvalidRequest("kv_transports", f"{','.join(self.kv_transports)!r} is not a list of {', '.join(TRANSPORTS)}")
        if not 0 <= self.kv_port <= 65535:
            raise InvalidRequest("kv_port", f"{self.kv_port} is outside [0, 65535]", limit=65535)

    def engine_settings(self) -> EngineSettings:
        """The engine's part. Small models have small blocks, or a short prompt would never fill one."""
        return EngineSettings(
            device=self.device,
            cuda_graphs=self.cuda_graphs,
            batch_invariant=self.batch_invariant,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            max_model_len=self.max_model_len,
            block_size=(16 if self.model == "demo" else 64) if self.block_size is None else self.block_size,
            kv_memory_bytes=self.kv_memory_bytes,
            max_num_seqs=self.max_num_seqs,
            max_num_requests=self.max_num_requests,
            prefill_chunk_tokens=self.prefill_chunk_tokens,
            num_threads=self.num_threads,
        )
