from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("workers", "ls_attainment", "ls_window_requests", "limits")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    LS_ATTAINMENT_FIELD_NUMBER: _ClassVar[int]
    LS_WINDOW_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    ls_attainment: float
    ls_window_requests: int
    limits: Limits
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., ls_attainment: _Optional[float] = ..., ls_window_requests: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("ls_running_max", "be_rows_per_stage", "be_prefill_tokens_per_iteration", "be_device_kv_share", "safety_margin")
    LS_RUNNING_MAX_FIELD_NUMBER: _ClassVar[int]
    BE_ROWS_PER_STAGE_FIELD_NUMBER: _ClassVar[int]
    BE_PREFILL_TOKENS_PER_ITERATION_FIELD_NUMBER: _ClassVar[int]
    BE_DEVICE_KV_SHARE_FIELD_NUMBER: _ClassVar[int]
    SAFETY_MARGIN_FIELD_NUMBER: _ClassVar[int]
    ls_running_max: int
    be_rows_per_stage: int
    be_prefill_tokens_per_iteration: int
    be_device_kv_share: float
    safety_margin: float
    def __init__(self, ls_running_max: _Optional[int] = ..., be_rows_per_stage: _Optional[int] = ..., be_prefill_tokens_per_iteration: _Optional[int] = ..., be_device_kv_share: _Optional[float] = ..., safety_margin: _Optional[float] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "model", "device", "policy", "telemetry", "attention_servers")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_SERVERS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    model: str
    device: str
    policy: str
    telemetry: Telemetry
    attention_servers: _containers.RepeatedCompositeFieldContainer[AttentionServerStatus]
    def __init__(self, worker_id: _Optional[str] = ..., model: _Optional[str] = ..., device: _Optional[str] = ..., policy: _Optional[str] = ..., telemetry: _Optional[_Union[Telemetry, _Mapping]] = ..., attention_servers: _Optional[_Iterable[_Union[AttentionServerStatus, _Mapping]]] = ...) -> None: ...

class TokensByPath(_message.Message):
    __slots__ = ("device_resident", "boarded", "be_only")
    DEVICE_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    BOARDED_FIELD_NUMBER: _ClassVar[int]
    BE_ONLY_FIELD_NUMBER: _ClassVar[int]
    device_resident: int
    boarded: int
    be_only: int
    def __init__(self, device_resident: _Optional[int] = ..., boarded: _Optional[int] = ..., be_only: _Optional[int] = ...) -> None: ...

class Telemetry(_message.Message):
    __slots__ = ("taken_monotonic_ns", "passes", "ls_stages", "be_only_stages", "boarded_rows", "be_only_rows", "ring_waits", "recomputed_tokens", "ls_output_tokens", "be_output_tokens", "be_tokens_by_path", "demotions", "promotions", "checkpointed_tokens", "busy_ns", "bubble_ns", "prefix_cache_query_tokens", "prefix_cache_hit_tokens", "ls_running", "ls_waiting", "be_device_resident", "be_waiting", "rows_parked", "rows_away", "device_blocks_total", "device_blocks_free", "ls_prefill_tokens_waiting", "decode_pass_ms", "prefill_token_ms", "kv_checkpoint_lag_tokens", "ls_started", "ls_queue_ns")
    TAKEN_MONOTONIC_NS_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    LS_STAGES_FIELD_NUMBER: _ClassVar[int]
    BE_ONLY_STAGES_FIELD_NUMBER: _ClassVar[int]
    BOARDED_ROWS_FIELD_NUMBER: _ClassVar[int]
    BE_ONLY_ROWS_FIELD_NUMBER: _ClassVar[int]
    RING_WAITS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LS_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BE_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BE_TOKENS_BY_PATH_FIELD_NUMBER: _ClassVar[int]
    DEMOTIONS_FIELD_NUMBER: _ClassVar[int]
    PROMOTIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUSY_NS_FIELD_NUMBER: _ClassVar[int]
    BUBBLE_NS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    LS_WAITING_FIELD_NUMBER: _ClassVar[int]
    BE_DEVICE_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    BE_WAITING_FIELD_NUMBER: _ClassVar[int]
    ROWS_PARKED_FIELD_NUMBER: _ClassVar[int]
    ROWS_AWAY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    LS_PREFILL_TOKENS_WAITING_FIELD_NUMBER: _ClassVar[int]
    DECODE_PASS_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    KV_CHECKPOINT_LAG_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LS_STARTED_FIELD_NUMBER: _ClassVar[int]
    LS_QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    taken_monotonic_ns: int
    passes: int
    ls_stages: int
    be_only_stages: int
    boarded_rows: int
    be_only_rows: int
    ring_waits: int
    recomputed_tokens: int
    ls_output_tokens: int
    be_output_tokens: int
    be_tokens_by_path: TokensByPath
    demotions: int
    promotions: int
    checkpointed_tokens: int
    busy_ns: int
    bubble_ns: int
    prefix_cache_query_tokens: int
    prefix_cache_hit_tokens: int
    ls_running: int
    ls_waiting: int
    be_device_resident: int
    be_waiting: int
    rows_parked: int
    rows_away: int
    device_blocks_total: int
    device_blocks_free: int
    ls_prefill_tokens_waiting: int
    decode_pass_ms: float
    prefill_token_ms: float
    kv_checkpoint_lag_tokens: int
    ls_started: int
    ls_queue_ns: int
    def __init__(self, taken_monotonic_ns: _Optional[int] = ..., passes: _Optional[int] = ..., ls_stages: _Optional[int] = ..., be_only_stages: _Optional[int] = ..., boarded_rows: _Optional[int] = ..., be_only_rows: _Optional[int] = ..., ring_waits: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ..., ls_output_tokens: _Optional[int] = ..., be_output_tokens: _Optional[int] = ..., be_tokens_by_path: _Optional[_Union[TokensByPath, _Mapping]] = ..., demotions: _Optional[int] = ..., promotions: _Optional[int] = ..., checkpointed_tokens: _Optional[int] = ..., busy_ns: _Optional[int] = ..., bubble_ns: _Optional[int] = ..., prefix_cache_query_tokens: _Optional[int] = ..., prefix_cache_hit_tokens: _Optional[int] = ..., ls_running: _Optional[int] = ..., ls_waiting: _Optional[int] = ..., be_device_resident: _Optional[int] = ..., be_waiting: _Optional[int] = ..., rows_parked: _Optional[int] = ..., rows_away: _Optional[int] = ..., device_blocks_total: _Optional[int] = ..., device_blocks_free: _Optional[int] = ..., ls_prefill_tokens_waiting: _Optional[int] = ..., decode_pass_ms: _Optional[float] = ..., prefill_token_ms: _Optional[float] = ..., kv_checkpoint_lag_tokens: _Optional[int] = ..., ls_started: _Optional[int] = ..., ls_queue_ns: _Optional[int] = ...) -> None: ...

class AttentionServerStatus(_message.Message):
    __slots__ = ("server_id", "pid", "rows", "kv_bytes_read", "pages_total", "pages_free", "errors")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    pid: int
    rows: int
    kv_bytes_read: int
    pages_total: int
    pages_free: int
    errors: int
    def __init__(self, server_id: _Optional[str] = ..., pid: _Optional[int] = ..., rows: _Optional[int] = ..., kv_bytes_read: _Optional[int] = ..., pages_total: _Optional[int] = ..., pages_free: _Optional[int] = ..., errors: _Optional[int] = ...) -> None: ...
