"""What the system is doing, as `Client.status` returns it. Fields mirror status.proto."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Set by the outer loop, obeyed by a worker's scheduler."""

    ls_running_max: int = 0
    """Latency-sensitive requests that may run at once."""
    be_rows_per_stage: int = 0
    """Best-effort rows that may board one stage beside latency-sensitive rows."""
    be_prefill_tokens_per_iteration: int = 0
    """Best-effort prompt tokens per iteration."""
    be_device_kv_share: float = 0.0
    """Part of the device KV that best effort may hold, 0 to 1."""
    safety_margin: float = 0.0
    """Part of the slack that the scheduler leaves unused, 0 to 1."""


@dataclass(frozen=True)
class TokensByPath:
    """Best-effort output tokens by where their attention and dense work ran."""

    device_resident: int = 0
    """Attention on the device."""
    boarded: int = 0
    """Attention on the servers, most stages beside latency-sensitive rows."""
    be_only: int = 0
    """Attention on the servers, most stages without a latency-sensitive row."""


@dataclass(frozen=True)
class Telemetry:
    """Counters grow from the engine's start; gauges, from `ls_running` on, say what is now."""

    passes: int = 0
    """Sweeps over all stages with latency-sensitive rows."""
    ls_stages: int = 0
    """Stages run with at least one latency-sensitive row."""
    be_only_stages: int = 0
    """Stages run without one."""
    boarded_rows: int = 0
    """Rows that boarded a stage with a latency-sensitive row in it."""
    be_only_rows: int = 0
    """Rows that boarded a stage without one."""
    ring_waits: int = 0
    """Times a full ring made the worker keep a message back."""
    recomputed_tokens: int = 0
    """Tokens computed again: their KV was dropped, or their pass was called off."""
    ls_output_tokens: int = 0
    """Latency-sensitive tokens sampled."""
    be_output_tokens: int = 0
    """Best-effort tokens sampled."""
    be_tokens_by_path: TokensByPath = field(default_factory=TokensByPath)
    """`be_output_tokens`, split."""
    demotions: int = 0
    """Best-effort requests moved from the device to a server."""
    promotions: int = 0
    """Best-effort requests moved back."""
    checkpointed_tokens: int = 0
    """Tokens whose KV was copied to a server."""
    busy_ns: int = 0
    """Time that the engine spent in stages."""
    bubble_ns: int = 0
    """Time that the device had nothing to do between two stages of latency-sensitive passes."""
    prefix_cache_query_tokens: int = 0
    """Known tokens of requests that started on the device."""
    prefix_cache_hit_tokens: int = 0
    """Those of them whose KV was cached."""
    ls_running: int = 0
    """Latency-sensitive requests that hold device KV."""
    ls_waiting: int = 0
    """Latency-sensitive requests not yet started."""
    be_device_resident: int = 0
    """Best-effort requests on the device, in prefill or decode."""
    be_waiting: int = 0
    """Best-effort requests not yet started."""
    rows_parked: int = 0
    """Best-effort rows between two stages."""
    rows_away: int = 0
    """Parked rows whose attention has not come back."""
    device_blocks_total: int = 0
    """KV blocks of the device."""
    device_blocks_free: int = 0
    """Those that nobody holds."""
    ls_prefill_tokens_waiting: int = 0
    """Prompt tokens that latency-sensitive requests have still to compute."""
    decode_pass_ms: float = 0.0
    """Predicted time of a pass of decode rows."""
    prefill_token_ms: float = 0.0
    """Predicted time of one prompt token."""
    kv_checkpoint_lag_tokens: int = 0
    """Best-effort tokens on the device whose KV their server does not have yet."""
    ls_started: int = 0
    """Latency-sensitive requests whose first stage has begun."""
    ls_queue_ns: int = 0
    """How long all of them waited for it."""
    taken_monotonic_ns: int = 0
    """When these figures were taken, by the monotonic clock of the worker's host."""


@dataclass(frozen=True)
class AttentionServerStatus:
    """One attention server, as its worker sees it."""

    server_id: str
    """Its name."""
    pid: int
    """Its process."""
    rows: int
    """Rows it has attended."""
    kv_bytes_read: int
    """Bytes of KV it has read for them."""
    pages_total: int
    """Pages of its arena."""
    pages_free: int
    """Those that nobody holds."""
    errors: int
    """Messages it refused."""


@dataclass(frozen=True)
class WorkerStatus:
    """One worker."""

    worker_id: str
    """Its name."""
    model: str
    """The model it serves."""
    device: str
    """What it runs on."""
    policy: str
    """How it schedules."""
    telemetry: Telemetry
    """Its counters and gauges."""
    attention_servers: tuple[AttentionServerStatus, ...]
    """The servers it sends rows to."""


@dataclass(frozen=True)
class Status:
    """The whole system."""

    workers: tuple[WorkerStatus, ...]
    """Workers whose heartbeat is fresh."""
    ls_attainment: float
    """Share of latency-sensitive requests of the window that met both objectives."""
    ls_window_requests: int
    """Requests that ended in the window."""
    limits: Limits
    """What the outer loop allows now."""
