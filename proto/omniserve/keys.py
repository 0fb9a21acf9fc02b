"""Every Redis key: its type, TTL and writer. No other module spells a key.

| key | type | TTL | writer |
| --- | --- | --- | --- |
| `omniserve:worker:{worker_id}` | string, JSON | HEARTBEAT_TTL_S | gpuworker front |
"""

from __future__ import annotations

PREFIX = "omniserve:"
HEARTBEAT_TTL_S = 3.0


def worker(worker_id: str) -> str:
    """Heartbeat: {"address": gRPC address, "status": GetWorkerStatusResponse, base64}."""
    return f"{PREFIX}worker:{worker_id}"


WORKERS_PATTERN = f"{PREFIX}worker:*"
