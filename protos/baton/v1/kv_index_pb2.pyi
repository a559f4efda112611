from protos.baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BlockEvent(_message.Message):
    __slots__ = ("worker", "sequence_number", "snapshot", "removed", "stored", "gone")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    worker: _common_pb2.WorkerId
    sequence_number: int
    snapshot: bool
    removed: bytes
    stored: bytes
    gone: bool
    def __init__(self, worker: _Optional[_Union[_common_pb2.WorkerId, _Mapping]] = ..., sequence_number: _Optional[int] = ..., snapshot: bool = ..., removed: _Optional[bytes] = ..., stored: _Optional[bytes] = ..., gone: bool = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: BlockEvent
    def __init__(self, event: _Optional[_Union[BlockEvent, _Mapping]] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ("sequence_number", "need_snapshot")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    NEED_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    need_snapshot: bool
    def __init__(self, sequence_number: _Optional[int] = ..., need_snapshot: bool = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("hashes",)
    HASHES_FIELD_NUMBER: _ClassVar[int]
    hashes: bytes
    def __init__(self, hashes: _Optional[bytes] = ...) -> None: ...

class MatchResponse(_message.Message):
    __slots__ = ("matches",)
    MATCHES_FIELD_NUMBER: _ClassVar[int]
    matches: _containers.RepeatedCompositeFieldContainer[PrefixMatch]
    def __init__(self, matches: _Optional[_Iterable[_Union[PrefixMatch, _Mapping]]] = ...) -> None: ...

class PrefixMatch(_message.Message):
    __slots__ = ("worker_id", "num_blocks")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    num_blocks: int
    def __init__(self, worker_id: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("events", "synchronized")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SYNCHRONIZED_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[BlockEvent]
    synchronized: bool
    def __init__(self, events: _Optional[_Iterable[_Union[BlockEvent, _Mapping]]] = ..., synchronized: bool = ...) -> None: ...
