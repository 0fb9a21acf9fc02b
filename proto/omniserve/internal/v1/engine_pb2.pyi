from omniserve.internal.v1 import attention_pb2 as _attention_pb2
from omniserve.internal.v1 import worker_pb2 as _worker_pb2
from omniserve.v1 import status_pb2 as _status_pb2
from omniserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineCommand(_message.Message):
    __slots__ = ("submit", "cancel", "limits", "shutdown", "attach", "sent_ns")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SHUTDOWN_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    SENT_NS_FIELD_NUMBER: _ClassVar[int]
    submit: _worker_pb2.WorkerServiceGenerateRequest
    cancel: str
    limits: _status_pb2.Limits
    shutdown: Shutdown
    attach: AttachServer
    sent_ns: int
    def __init__(self, submit: _Optional[_Union[_worker_pb2.WorkerServiceGenerateRequest, _Mapping]] = ..., cancel: _Optional[str] = ..., limits: _Optional[_Union[_status_pb2.Limits, _Mapping]] = ..., shutdown: _Optional[_Union[Shutdown, _Mapping]] = ..., attach: _Optional[_Union[AttachServer, _Mapping]] = ..., sent_ns: _Optional[int] = ...) -> None: ...

class AttachServer(_message.Message):
    __slots__ = ("index", "segment")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    index: int
    segment: _attention_pb2.AttachResponse
    def __init__(self, index: _Optional[int] = ..., segment: _Optional[_Union[_attention_pb2.AttachResponse, _Mapping]] = ...) -> None: ...

class Shutdown(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineEvent(_message.Message):
    __slots__ = ("ready", "failed", "sampled", "ended", "telemetry")
    READY_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    ready: EngineReady
    failed: EngineFailed
    sampled: SampledTokens
    ended: RequestEnded
    telemetry: _status_pb2.Telemetry
    def __init__(self, ready: _Optional[_Union[EngineReady, _Mapping]] = ..., failed: _Optional[_Union[EngineFailed, _Mapping]] = ..., sampled: _Optional[_Union[SampledTokens, _Mapping]] = ..., ended: _Optional[_Union[RequestEnded, _Mapping]] = ..., telemetry: _Optional[_Union[_status_pb2.Telemetry, _Mapping]] = ...) -> None: ...

class EngineReady(_message.Message):
    __slots__ = ("model", "context_tokens", "vocabulary_tokens", "ls_tokens_max", "be_prompt_tokens_max", "geometry", "layers")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LS_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    BE_PROMPT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    context_tokens: int
    vocabulary_tokens: int
    ls_tokens_max: int
    be_prompt_tokens_max: int
    geometry: _attention_pb2.Geometry
    layers: _containers.RepeatedCompositeFieldContainer[_attention_pb2.LayerOptions]
    def __init__(self, model: _Optional[str] = ..., context_tokens: _Optional[int] = ..., vocabulary_tokens: _Optional[int] = ..., ls_tokens_max: _Optional[int] = ..., be_prompt_tokens_max: _Optional[int] = ..., geometry: _Optional[_Union[_attention_pb2.Geometry, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[_attention_pb2.LayerOptions, _Mapping]]] = ...) -> None: ...

class EngineFailed(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class SampledTokens(_message.Message):
    __slots__ = ("request_ids", "token_ids", "logprobs")
    class LogprobsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: _types_pb2.TokenLogprobs
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[_types_pb2.TokenLogprobs, _Mapping]] = ...) -> None: ...
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.MessageMap[int, _types_pb2.TokenLogprobs]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Mapping[int, _types_pb2.TokenLogprobs]] = ...) -> None: ...

class RequestEnded(_message.Message):
    __slots__ = ("request_id", "reason", "error", "cached_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reason: _types_pb2.FinishReason
    error: str
    cached_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., error: _Optional[str] = ..., cached_tokens: _Optional[int] = ...) -> None: ...
