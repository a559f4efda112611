"""The one tree of errors that may cross a boundary of Baton.

    BatonError
    ├── InvalidRequest      a parameter is malformed or beyond a limit; nobody retries
    ├── UnknownRequest      no such request
    ├── ResourceExhausted   no room now; carries a retry delay
    │   ├── QueueFull
    │   └── OutOfBlocks
    ├── CheckpointError     a checkpoint cannot be served; an operator must act
    └── EngineStopped       the engine is closed or died; another worker may serve

Messages are for people and name the field and the limit ("need 7 KV blocks, 3 free"); `reason` is for machines.
Knows nothing of gRPC or HTTP: one table in the mesh maps these to status codes.
"""

from typing import ClassVar


class BatonError(Exception):
    """Base of every error that a caller of Baton may see."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(BatonError):
    """A field of the request is wrong; `limit` is what it must keep to, if there is one."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, message: str, *, limit: object = None) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.limit = limit


class UnknownRequest(BatonError):
    """No request of that id is known here."""

    reason = "UNKNOWN_REQUEST"


class ResourceExhausted(BatonError):
    """There is no room now; the same call may succeed after `retry_after_s`."""

    reason = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(ResourceExhausted):
    """The waiting queue is at its bound."""

    reason = "QUEUE_FULL"


class OutOfBlocks(ResourceExhausted):
    """The KV pool has fewer free blocks than needed."""

    reason = "OUT_OF_BLOCKS"


class CheckpointError(BatonError):
    """A checkpoint is incomplete, inconsistent or of a kind that Baton does not serve; `path` is where."""

    reason = "CHECKPOINT_UNUSABLE"

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class EngineStopped(BatonError):
    """The engine has been closed, or its thread died; no request runs here any more."""

    reason = "ENGINE_STOPPED"
