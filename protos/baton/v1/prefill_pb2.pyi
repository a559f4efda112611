from protos.baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "token_ids", "sampling", "prefix_key", "layout_fingerprint", "grant", "trace_context", "prompt_length", "sent_unix_s")
    class TraceContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PREFIX_KEY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    TRACE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    token_ids: _common_pb2.TokenIds
    sampling: _common_pb2.SamplingParams
    prefix_key: bytes
    layout_fingerprint: bytes
    grant: KVGrant
    trace_context: _containers.ScalarMap[str, str]
    prompt_length: int
    sent_unix_s: float
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., prefix_key: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ..., grant: _Optional[_Union[KVGrant, _Mapping]] = ..., trace_context: _Optional[_Mapping[str, str]] = ..., prompt_length: _Optional[int] = ..., sent_unix_s: _Optional[float] = ...) -> None: ...

class KVGrant(_message.Message):
    __slots__ = ("transfer_id", "first_block", "block_ids", "endpoint")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    first_block: int
    block_ids: bytes
    endpoint: KVEndpoint
    def __init__(self, transfer_id: _Optional[bytes] = ..., first_block: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., endpoint: _Optional[_Union[KVEndpoint, _Mapping]] = ...) -> None: ...

class KVEndpoint(_message.Message):
    __slots__ = ("host_id", "shm_address", "tcp_address", "grpc", "access_key", "regions")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    SHM_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TCP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GRPC_FIELD_NUMBER: _ClassVar[int]
    ACCESS_KEY_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    shm_address: str
    tcp_address: str
    grpc: bool
    access_key: bytes
    regions: _containers.RepeatedCompositeFieldContainer[KVRegion]
    def __init__(self, host_id: _Optional[str] = ..., shm_address: _Optional[str] = ..., tcp_address: _Optional[str] = ..., grpc: bool = ..., access_key: _Optional[bytes] = ..., regions: _Optional[_Iterable[_Union[KVRegion, _Mapping]]] = ...) -> None: ...

class KVRegion(_message.Message):
    __slots__ = ("num_blocks", "block_bytes")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    block_bytes: int
    def __init__(self, num_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("accepted", "progress", "block", "done")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    accepted: PrefillAccepted
    progress: PrefillProgress
    block: KVBlock
    done: PrefillDone
    def __init__(self, accepted: _Optional[_Union[PrefillAccepted, _Mapping]] = ..., progress: _Optional[_Union[PrefillProgress, _Mapping]] = ..., block: _Optional[_Union[KVBlock, _Mapping]] = ..., done: _Optional[_Union[PrefillDone, _Mapping]] = ...) -> None: ...

class PrefillAccepted(_message.Message):
    __slots__ = ("worker_id", "kv_transport")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    kv_transport: str
    def __init__(self, worker_id: _Optional[str] = ..., kv_transport: _Optional[str] = ...) -> None: ...

class PrefillProgress(_message.Message):
    __slots__ = ("computed_tokens", "engine_steps")
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_STEPS_FIELD_NUMBER: _ClassVar[int]
    computed_tokens: int
    engine_steps: int
    def __init__(self, computed_tokens: _Optional[int] = ..., engine_steps: _Optional[int] = ...) -> None: ...

class KVBlock(_message.Message):
    __slots__ = ("index", "data", "checksum")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    index: int
    data: bytes
    checksum: int
    def __init__(self, index: _Optional[int] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class PrefillDone(_message.Message):
    __slots__ = ("first_tokens", "cached_tokens", "blocks_sent", "queue_s", "prefill_s", "model_s", "since_first_token_s", "transfer_s", "to_prefill_s", "sent_unix_s")
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_SENT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_S_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    TO_PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    first_tokens: _containers.RepeatedCompositeFieldContainer[FirstToken]
    cached_tokens: int
    blocks_sent: int
    queue_s: float
    prefill_s: float
    model_s: float
    since_first_token_s: float
    transfer_s: float
    to_prefill_s: float
    sent_unix_s: float
    def __init__(self, first_tokens: _Optional[_Iterable[_Union[FirstToken, _Mapping]]] = ..., cached_tokens: _Optional[int] = ..., blocks_sent: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., model_s: _Optional[float] = ..., since_first_token_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., to_prefill_s: _Optional[float] = ..., sent_unix_s: _Optional[float] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token_id", "logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprobs: _common_pb2.TokenLogprobs
    def __init__(self, token_id: _Optional[int] = ..., logprobs: _Optional[_Union[_common_pb2.TokenLogprobs, _Mapping]] = ...) -> None: ...

class WatchLoadRequest(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class WatchLoadResponse(_message.Message):
    __slots__ = ("worker", "model", "kv_transports", "load")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    worker: _common_pb2.WorkerId
    model: _common_pb2.ModelIdentity
    kv_transports: _containers.RepeatedScalarFieldContainer[str]
    load: _common_pb2.WorkerLoad
    def __init__(self, worker: _Optional[_Union[_common_pb2.WorkerId, _Mapping]] = ..., model: _Optional[_Union[_common_pb2.ModelIdentity, _Mapping]] = ..., kv_transports: _Optional[_Iterable[str]] = ..., load: _Optional[_Union[_common_pb2.WorkerLoad, _Mapping]] = ...) -> None: ...
