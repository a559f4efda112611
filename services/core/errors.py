"""The one tree of errors that may cross a boundary of Baton.

    BatonError
    ├── InvalidRequest      a parameter is malformed or beyond a limit; nobody retries
    ├── UnknownRequest      no such request
    ├── UnknownModel        no worker serves a model of that name
    ├── ResourceExhausted   no room now; carries a retry delay
    │   ├── QueueFull
    │   ├── OutOfBlocks
    │   └── Overloaded      the deadline or the objective could not be met: shed before any work
    ├── Unavailable         not now, not here; carries a retry delay; another worker may serve
    │   ├── Draining
    │   ├── PeerUnavailable a service that this one needs cannot be reached, or stopped answering
    │   └── EngineStopped   the engine is closed or died
    ├── DeadlineExceeded    the caller's time is over
    ├── SlowReader          the caller does not read its stream: too much waits for it
    ├── Incompatible        the two sides differ in model or KV layout; an operator must act
    ├── TransferFenced      a KV transfer was ended before all blocks had landed; another prefill may follow
    ├── ChecksumMismatch    a KV block arrived with other bytes than were sent; the prefill is repeated
    ├── CheckpointError     a checkpoint cannot be served; an operator must act
    └── ConfigurationError  settings of a process are wrong; all problems at once

Messages are for people and name the field and the limit ("need 7 KV blocks, 3 free"); `reason` is for machines.
Knows nothing of gRPC or HTTP: one table in the mesh maps these to status codes.
"""

from collections.abc import Sequence
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


class Overloaded(ResourceExhausted):
    """No worker would be in time: the request is refused before anything was computed for it."""

    reason = "OVERLOADED"


class UnknownModel(BatonError):
    """No worker serves a model of that name."""

    reason = "UNKNOWN_MODEL"


class Unavailable(BatonError):
    """This process cannot serve now; the same call may succeed elsewhere, or here after `retry_after_s`."""

    reason = "UNAVAILABLE"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(Unavailable):
    """The process finishes what it has and takes nothing new."""

    reason = "DRAINING"


class PeerUnavailable(Unavailable):
    """A service that this one needs cannot be reached, or has stopped answering."""

    reason = "PEER_UNAVAILABLE"


class EngineStopped(Unavailable):
    """The engine has been closed, or its thread died; no request runs here any more."""

    reason = "ENGINE_STOPPED"


class DeadlineExceeded(BatonError):
    """The caller's deadline has passed."""

    reason = "DEADLINE_EXCEEDED"


class SlowReader(BatonError):
    """More waits for the caller than is kept for one that does not read; nobody else can help it."""

    reason = "SLOW_READER"


class Incompatible(BatonError):
    """Two sides differ in what must be equal: model, KV layout, protocol. Nothing helps until an operator acts."""

    reason = "INCOMPATIBLE"


class TransferFenced(BatonError):
    """A KV transfer was ended, by either side, before all its blocks had landed."""

    reason = "TRANSFER_FENCED"


class ChecksumMismatch(BatonError):
    """A KV block arrived with other bytes than were sent."""

    reason = "CHECKSUM_MISMATCH"


class ConfigurationError(BatonError):
    """Settings are unknown, missing or out of their limits; `problems` names them all."""

    reason = "CONFIGURATION"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class CheckpointError(BatonError):
    """A checkpoint is incomplete, inconsistent or of a kind that Baton does not serve; `path` is where."""

    reason = "CHECKPOINT_UNUSABLE"

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
