from protos.baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionCommand(_message.Message):
    __slots__ = ("hello", "start", "cancel", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: SessionHello
    start: Start
    cancel: Cancel
    heartbeat: Heartbeat
    def __init__(self, hello: _Optional[_Union[SessionHello, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionHello(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("handle", "request_id", "attempt", "remaining_s", "token_ids", "sampling", "prefix_key", "candidates", "local_prefill_tokens", "trace_context", "prompt_length", "sent_unix_s")
    class TraceContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PREFIX_KEY_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRACE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    attempt: int
    remaining_s: float
    token_ids: _common_pb2.TokenIds
    sampling: _common_pb2.SamplingParams
    prefix_key: bytes
    candidates: _containers.RepeatedCompositeFieldContainer[PrefillCandidate]
    local_prefill_tokens: int
    trace_context: _containers.ScalarMap[str, str]
    prompt_length: int
    sent_unix_s: float
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., remaining_s: _Optional[float] = ..., token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., prefix_key: _Optional[bytes] = ..., candidates: _Optional[_Iterable[_Union[PrefillCandidate, _Mapping]]] = ..., local_prefill_tokens: _Optional[int] = ..., trace_context: _Optional[_Mapping[str, str]] = ..., prompt_length: _Optional[int] = ..., sent_unix_s: _Optional[float] = ...) -> None: ...

class PrefillCandidate(_message.Message):
    __slots__ = ("worker_id", "address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class StepFrame(_message.Message):
    __slots__ = ("handles", "positions", "token_ids", "logprobs", "endings", "prefilled", "load", "hello", "prompt_logprobs")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ENDINGS_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    positions: bytes
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[EntryLogprobs]
    endings: _containers.RepeatedCompositeFieldContainer[Ending]
    prefilled: _containers.RepeatedCompositeFieldContainer[Prefilled]
    load: _common_pb2.WorkerLoad
    hello: SessionWelcome
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    def __init__(self, handles: _Optional[bytes] = ..., positions: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[EntryLogprobs, _Mapping]]] = ..., endings: _Optional[_Iterable[_Union[Ending, _Mapping]]] = ..., prefilled: _Optional[_Iterable[_Union[Prefilled, _Mapping]]] = ..., load: _Optional[_Union[_common_pb2.WorkerLoad, _Mapping]] = ..., hello: _Optional[_Union[SessionWelcome, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ...) -> None: ...

class SessionWelcome(_message.Message):
    __slots__ = ("worker", "model", "kv_transports")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    worker: _common_pb2.WorkerId
    model: _common_pb2.ModelIdentity
    kv_transports: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker: _Optional[_Union[_common_pb2.WorkerId, _Mapping]] = ..., model: _Optional[_Union[_common_pb2.ModelIdentity, _Mapping]] = ..., kv_transports: _Optional[_Iterable[str]] = ...) -> None: ...

class EntryLogprobs(_message.Message):
    __slots__ = ("entry", "logprobs")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    entry: int
    logprobs: _common_pb2.TokenLogprobs
    def __init__(self, entry: _Optional[int] = ..., logprobs: _Optional[_Union[_common_pb2.TokenLogprobs, _Mapping]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("handle", "chosen", "num_top", "top_token_ids", "top_logprobs")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    chosen: bytes
    num_top: int
    top_token_ids: bytes
    top_logprobs: bytes
    def __init__(self, handle: _Optional[int] = ..., chosen: _Optional[bytes] = ..., num_top: _Optional[int] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ...) -> None: ...

class Ending(_message.Message):
    __slots__ = ("handle", "finish_reason", "error")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    handle: int
    finish_reason: _common_pb2.FinishReason
    error: _common_pb2.Error
    def __init__(self, handle: _Optional[int] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class Prefilled(_message.Message):
    __slots__ = ("handle", "prefill_worker_id", "decode_queue_s", "prefill_queue_s", "prefill_s", "model_s", "transfer_tail_s", "transfer_s", "decode_cached_tokens", "prefill_cached_tokens", "kv_transport", "kv_blocks", "kv_bytes", "prefill_attempts", "to_decode_s", "prefill_retry_s", "to_prefill_s", "prefill_return_s", "first_token_unix_s")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_TAIL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    TO_DECODE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_RETRY_S_FIELD_NUMBER: _ClassVar[int]
    TO_PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_RETURN_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    handle: int
    prefill_worker_id: str
    decode_queue_s: float
    prefill_queue_s: float
    prefill_s: float
    model_s: float
    transfer_tail_s: float
    transfer_s: float
    decode_cached_tokens: int
    prefill_cached_tokens: int
    kv_transport: str
    kv_blocks: int
    kv_bytes: int
    prefill_attempts: int
    to_decode_s: float
    prefill_retry_s: float
    to_prefill_s: float
    prefill_return_s: float
    first_token_unix_s: float
    def __init__(self, handle: _Optional[int] = ..., prefill_worker_id: _Optional[str] = ..., decode_queue_s: _Optional[float] = ..., prefill_queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., model_s: _Optional[float] = ..., transfer_tail_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., decode_cached_tokens: _Optional[int] = ..., prefill_cached_tokens: _Optional[int] = ..., kv_transport: _Optional[str] = ..., kv_blocks: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., prefill_attempts: _Optional[int] = ..., to_decode_s: _Optional[float] = ..., prefill_retry_s: _Optional[float] = ..., to_prefill_s: _Optional[float] = ..., prefill_return_s: _Optional[float] = ..., first_token_unix_s: _Optional[float] = ...) -> None: ...
