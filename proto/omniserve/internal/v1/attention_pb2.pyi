from omniserve.v1 import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Geometry(_message.Message):
    __slots__ = ("layers", "heads", "kv_heads", "head_dim", "dtype", "page_tokens", "max_sequences", "max_sequence_tokens", "slots", "kv_dtype")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    page_tokens: int
    max_sequences: int
    max_sequence_tokens: int
    slots: int
    kv_dtype: str
    def __init__(self, layers: _Optional[int] = ..., heads: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., page_tokens: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_sequence_tokens: _Optional[int] = ..., slots: _Optional[int] = ..., kv_dtype: _Optional[str] = ...) -> None: ...

class LayerOptions(_message.Message):
    __slots__ = ("window", "softcap", "sinks")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    window: int
    softcap: float
    sinks: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, window: _Optional[int] = ..., softcap: _Optional[float] = ..., sinks: _Optional[_Iterable[float]] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("worker_id", "epoch", "geometry", "bell_path", "layers")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    BELL_PATH_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    geometry: Geometry
    bell_path: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerOptions]
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., bell_path: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerOptions, _Mapping]]] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("server_id", "segment_path", "segment_id", "pages")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_PATH_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_ID_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    segment_path: str
    segment_id: int
    pages: int
    def __init__(self, server_id: _Optional[str] = ..., segment_path: _Optional[str] = ..., segment_id: _Optional[int] = ..., pages: _Optional[int] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("stats",)
    STATS_FIELD_NUMBER: _ClassVar[int]
    stats: _status_pb2.AttentionServerStatus
    def __init__(self, stats: _Optional[_Union[_status_pb2.AttentionServerStatus, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
