"""The system's own counters over time, as a run samples them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniserve.client import AttentionServerStatus, Status, Telemetry, WorkerStatus
from omniserve.client.bench.metrics import counted

BE_PATHS = ("device_resident", "boarded", "be_only")


@dataclass(frozen=True)
class Sample:
    """One answer of StatusService."""

    at_s: float
    """Since the start of the measured interval."""
    status: Status
    """The counters."""


def be_rates(samples: Sequence[Sample]) -> list[tuple[float, dict[str, float]]]:
    """Returns (time in s, best-effort tokens/s by path) between consecutive samples."""
    rates = []
    for before, after in zip(samples, samples[1:], strict=False):  # noqa: RUF007
        seconds = after.at_s - before.at_s
        tokens = be_tokens(before.status, after.status)
        rates.append((after.at_s, {path: n / seconds for path, n in tokens.items()}))
    return rates


def be_tokens(start: Status, end: Status) -> dict[str, int]:
    """Returns the best-effort tokens between two samples, by path."""
    return {
        path: sum(
            counted(getattr(a.be_tokens_by_path, path), getattr(b.be_tokens_by_path, path))
            for a, b in _telemetry(start, end)
        )
        for path in BE_PATHS
    }


def growth(start: Status, end: Status, counter: str) -> int:
    """Returns by how much a counter of Telemetry grew, over all workers."""
    return sum(counted(getattr(a, counter), getattr(b, counter)) for a, b in _telemetry(start, end))


def server_growth(start: Status, end: Status) -> list[dict[str, int]]:
    """Returns pid, rows and kv_bytes_read of each attention server between two samples."""
    before = {(w.worker_id, s.server_id): s for w in start.workers for s in w.attention_servers}
    return [
        _server(before.get((w.worker_id, s.server_id)), s)
        for w in end.workers
        for s in w.attention_servers
    ]


def _server(before: AttentionServerStatus | None, after: AttentionServerStatus) -> dict[str, int]:
    # A server that was restarted counts from 0 again.
    same = before is not None and before.pid == after.pid
    return {
        "pid": after.pid,
        "rows": counted(before.rows if same and before else 0, after.rows),
        "kv_bytes_read": counted(
            before.kv_bytes_read if same and before else 0, after.kv_bytes_read
        ),
    }


def _telemetry(start: Status, end: Status) -> list[tuple[Telemetry, Telemetry]]:
    before: dict[str, WorkerStatus] = {w.worker_id: w for w in start.workers}
    return [
        (before[w.worker_id].telemetry if w.worker_id in before else Telemetry(), w.telemetry)
        for w in end.workers
    ]
