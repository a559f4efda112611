"""Settings of the kv_index process. See README.md for what they mean to an operator."""

from dataclasses import dataclass

from services.core.errors import InvalidRequest
from services.mesh.index_client import HEARTBEAT_S
from services.mesh.server import ProcessSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class KVIndexSettings(ProcessSettings):
    """What every process has, and:

    redis_url            where the index survives a restart; None: in memory alone
    namespace            of the mesh in Redis: instances with equal ones stand by for each other
    lease_s              how long a silent worker's entries live; restarts of this service must take less
    watch_buffer_bytes   how far a router may fall behind before it must start over
    """

    redis_url: str | None = None
    namespace: str = "default"
    lease_s: float = 10.0
    watch_buffer_bytes: int = 16 << 20

    def validate(self) -> None:
        """Raises InvalidRequest naming the first setting that is out of its limits."""
        ProcessSettings.validate(self)
        if self.lease_s < 2 * HEARTBEAT_S:
            raise InvalidRequest("lease_s", f"{self.lease_s} is less than two heartbeats of a worker", limit=2 * HEARTBEAT_S)
        if self.watch_buffer_bytes < 1 << 17:
            raise InvalidRequest("watch_buffer_bytes", f"{self.watch_buffer_bytes} is less than two big events", limit=1 << 17)
        if not self.namespace or set(self.namespace) & set("{}"):
            raise InvalidRequest("namespace", f"{self.namespace!r} is empty or has braces")
