from protos.baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchStatusRequest(_message.Message):
    __slots__ = ("interval_s",)
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    def __init__(self, interval_s: _Optional[float] = ...) -> None: ...

class WatchStatusResponse(_message.Message):
    __slots__ = ("router_id", "model_name", "uptime_s", "in_flight", "accepted", "finished", "failed", "cancelled", "shed", "prompt_tokens", "cached_tokens", "output_tokens", "kv_bytes", "ttft", "tpot", "workers", "index_synchronized", "index_entries")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    SHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    TTFT_FIELD_NUMBER: _ClassVar[int]
    TPOT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    INDEX_SYNCHRONIZED_FIELD_NUMBER: _ClassVar[int]
    INDEX_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    model_name: str
    uptime_s: float
    in_flight: int
    accepted: int
    finished: int
    failed: int
    cancelled: int
    shed: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    kv_bytes: int
    ttft: Summary
    tpot: Summary
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    index_synchronized: bool
    index_entries: int
    def __init__(self, router_id: _Optional[str] = ..., model_name: _Optional[str] = ..., uptime_s: _Optional[float] = ..., in_flight: _Optional[int] = ..., accepted: _Optional[int] = ..., finished: _Optional[int] = ..., failed: _Optional[int] = ..., cancelled: _Optional[int] = ..., shed: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., ttft: _Optional[_Union[Summary, _Mapping]] = ..., tpot: _Optional[_Union[Summary, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., index_synchronized: bool = ..., index_entries: _Optional[int] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("count", "p50_s", "p90_s", "p99_s")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    P50_S_FIELD_NUMBER: _ClassVar[int]
    P90_S_FIELD_NUMBER: _ClassVar[int]
    P99_S_FIELD_NUMBER: _ClassVar[int]
    count: int
    p50_s: float
    p90_s: float
    p99_s: float
    def __init__(self, count: _Optional[int] = ..., p50_s: _Optional[float] = ..., p90_s: _Optional[float] = ..., p99_s: _Optional[float] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "role", "address", "state", "report_age_s", "in_flight", "load")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REPORT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    worker: _common_pb2.WorkerId
    role: str
    address: str
    state: str
    report_age_s: float
    in_flight: int
    load: _common_pb2.WorkerLoad
    def __init__(self, worker: _Optional[_Union[_common_pb2.WorkerId, _Mapping]] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., report_age_s: _Optional[float] = ..., in_flight: _Optional[int] = ..., load: _Optional[_Union[_common_pb2.WorkerLoad, _Mapping]] = ...) -> None: ...
