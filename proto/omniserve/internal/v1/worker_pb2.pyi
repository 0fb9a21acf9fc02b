from omniserve.v1 import status_pb2 as _status_pb2
from omniserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerServiceGenerateRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "service_class", "sampling", "slo", "resume_offset", "tenant", "generated_tokens", "stream_interval_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SERVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    RESUME_OFFSET_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STREAM_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    service_class: _types_pb2.ServiceClass
    sampling: _types_pb2.SamplingParams
    slo: _types_pb2.Slo
    resume_offset: int
    tenant: str
    generated_tokens: int
    stream_interval_ms: int
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., service_class: _Optional[_Union[_types_pb2.ServiceClass, str]] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., slo: _Optional[_Union[_types_pb2.Slo, _Mapping]] = ..., resume_offset: _Optional[int] = ..., tenant: _Optional[str] = ..., generated_tokens: _Optional[int] = ..., stream_interval_ms: _Optional[int] = ...) -> None: ...

class WorkerServiceGenerateResponse(_message.Message):
    __slots__ = ("offset", "token_ids", "finish_reason", "cached_tokens", "logprobs")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    offset: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: _types_pb2.FinishReason
    cached_tokens: int
    logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprobs]
    def __init__(self, offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., cached_tokens: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[_types_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class WorkerServiceCancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class WorkerServiceCancelResponse(_message.Message):
    __slots__ = ("cancelled",)
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    cancelled: bool
    def __init__(self, cancelled: _Optional[bool] = ...) -> None: ...

class SetLimitsRequest(_message.Message):
    __slots__ = ("limits",)
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    limits: _status_pb2.Limits
    def __init__(self, limits: _Optional[_Union[_status_pb2.Limits, _Mapping]] = ...) -> None: ...

class SetLimitsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWorkerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWorkerStatusResponse(_message.Message):
    __slots__ = ("status", "context_tokens", "dtype", "ls_tokens_max", "be_prompt_tokens_max", "draining")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LS_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    BE_PROMPT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    status: _status_pb2.WorkerStatus
    context_tokens: int
    dtype: str
    ls_tokens_max: int
    be_prompt_tokens_max: int
    draining: bool
    def __init__(self, status: _Optional[_Union[_status_pb2.WorkerStatus, _Mapping]] = ..., context_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., ls_tokens_max: _Optional[int] = ..., be_prompt_tokens_max: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...
