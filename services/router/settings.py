"""Settings of a router."""

import socket
from dataclasses import dataclass

from services.core.errors import InvalidRequest
from services.mesh.server import ProcessSettings, check_address

NO_HTTP = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings(ProcessSettings):
    """
    http_listen         host:port of the OpenAI-compatible HTTP server; port 0 takes a free one; "off": there is none
    model               checkpoint directory or hub name, for its tokenizer and chat template; "demo": the model that ships with Baton
    served_model_name   what clients call it; None: as the workers do
    router_id           in logs, timings and sessions; None: host name and address
    redis_url           where workers announce themselves
    namespace           of the mesh in Redis: its workers, routers and index have equal ones
    workers             members in place of Redis: role=host:port or role=worker_id@host:port each
    kv_index            addresses of index services, the owner and its standbys; none: requests are routed by load alone
    max_in_flight       requests accepted at once; one more is QueueFull
    ttft_slo_s          requests whose first token is predicted later than this are shed; 0: none is
    recovery_s          how long an accepted request waits for a decode worker when none is left, beyond its deadline never
    max_local_tokens    decode workers compute at most this many prompt tokens while there is a prefill worker; None: by predicted cost
    """

    listen: str = "127.0.0.1:50051"
    http_listen: str = "127.0.0.1:8000"
    model: str = "demo"
    served_model_name: str | None = None
    router_id: str | None = None
    redis_url: str | None = None
    namespace: str = "default"
    workers: tuple[str, ...] = ()
    kv_index: tuple[str, ...] = ()
    max_in_flight: int = 1024
    ttft_slo_s: float = 0.0
    recovery_s: float = 30.0
    max_local_tokens: int | None = None

    def validate(self) -> None:
        """Raises InvalidRequest naming the first setting that is out of its limits."""
        ProcessSettings.validate(self)
        if self.http_listen != NO_HTTP:
            check_address("http_listen", self.http_listen)
        if (self.redis_url is None) == (not self.workers):
            raise InvalidRequest("workers", "set either redis_url or workers, so that the router knows whom to ask")
        if self.max_in_flight < 1:
            raise InvalidRequest("max_in_flight", f"{self.max_in_flight} is less than 1", limit=1)
        if self.max_local_tokens is not None and self.max_local_tokens < 0:
            raise InvalidRequest("max_local_tokens", f"{self.max_local_tokens} is negative", limit=0)
        for name in ("ttft_slo_s", "recovery_s"):
            if not getattr(self, name) >= 0:
                raise InvalidRequest(name, f"{getattr(self, name)} is not a number of seconds", limit=0)

    def resolved_router_id(self) -> str:
        """The router's name."""
        return self.router_id or f"{socket.gethostname()}-{self.listen}"
