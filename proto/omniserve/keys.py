"""Every Redis key: its type, TTL and writer. No other module spells a key.

| key | type | TTL | writer |
| --- | --- | --- | --- |
| `omniserve:worker:{worker_id}` | string, JSON | HEARTBEAT_TTL_S | gpuworker front |
| `omniserve:limits` | string, JSON | none | controlplane that holds `limits_lock` |
| `omniserve:limits_lock` | string, holder's id | LIMITS_LOCK_TTL_S | controlplane |
| `omniserve:ls:{second}` | hash: total, met | attainment window + 5 s | controlplane |
| `omniserve:request:{request_id}` | string, JSON | REQUEST_TTL_S | controlplane that serves it |
| `omniserve:be` | Stream, group BE_GROUP | none; an entry goes when its item ends | controlplane |
| `omniserve:job:{job_id}` | hash | retention, from the job's end on | controlplane |
| `omniserve:job_results:{job_id}` | list of JobResult, serialized | as the job | controlplane |
| `omniserve:job_entries:{job_id}` | list of ids in `omniserve:be` | as the job | controlplane |

Fields of a job's hash: `fingerprint` (SHA-256 of what was submitted), `state` (a JobState as a
number), `total`, `completed`, `failed`. Fields of a Stream entry: `job`, `custom_id` and `request`
(a WorkerServiceGenerateRequest, serialized). An entry is in the Stream exactly as long as its
item has no result: deleting it is what makes a result count once.
"""

from __future__ import annotations

PREFIX = "omniserve:"
HEARTBEAT_TTL_S = 3.0
LIMITS_LOCK_TTL_S = 1.0
REQUEST_TTL_S = 600.0

WORKERS_PATTERN = f"{PREFIX}worker:*"
LIMITS = f"{PREFIX}limits"
LIMITS_LOCK = f"{PREFIX}limits_lock"
BE_STREAM = f"{PREFIX}be"
BE_GROUP = "controlplane"


def worker(worker_id: str) -> str:
    """Heartbeat: {"address": gRPC address, "status": GetWorkerStatusResponse, base64}."""
    return f"{PREFIX}worker:{worker_id}"


def ls_second(second: int) -> str:
    """LS requests that ended in one second of Unix time, and those of them that met their SLO."""
    return f"{PREFIX}ls:{second}"


def request(request_id: str) -> str:
    """Where a request runs: {"worker": id, "base": generated tokens it was resubmitted with}."""
    return f"{PREFIX}request:{request_id}"


def job(job_id: str) -> str:
    return f"{PREFIX}job:{job_id}"


def job_results(job_id: str) -> str:
    return f"{PREFIX}job_results:{job_id}"


def job_entries(job_id: str) -> str:
    return f"{PREFIX}job_entries:{job_id}"
