"""Jobs in Redis: every step that must be whole is one Lua script. See omniserve.keys.

An item's Stream entry lives exactly as long as the item has no result, so deleting the entry
decides, atomically, whose result counts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import redis.exceptions

from omniserve import keys
from omniserve.controlplane.store import store_errors
from omniserve.errors import JobNotFoundError, QueueFullError, RequestExistsError
from omniserve.internal.v1.worker_pb2 import WorkerServiceGenerateRequest
from omniserve.v1 import jobs_pb2

log = logging.getLogger(__name__)

READ_BLOCK_MS = 500

# KEYS job, entries, stream; ARGV fingerprint, queue bound, RUNNING, job id, then per item
# its custom id and request.
_SUBMIT = """
local known = redis.call('HGET', KEYS[1], 'fingerprint')
if known then return known == ARGV[1] and 'same' or 'other' end
local total = (#ARGV - 4) / 2
if redis.call('XLEN', KEYS[3]) + total > tonumber(ARGV[2]) then return 'full' end
redis.call('HSET', KEYS[1], 'fingerprint', ARGV[1], 'state', ARGV[3],
           'total', total, 'completed', 0, 'failed', 0)
for i = 5, #ARGV, 2 do
  local id = redis.call('XADD', KEYS[3], '*', 'job', ARGV[4],
                        'custom_id', ARGV[i], 'request', ARGV[i + 1])
  redis.call('RPUSH', KEYS[2], id)
end
return 'created'
"""

# KEYS job, results, entries, stream; ARGV group, entry id, result, counter, COMPLETED, TTL.
_FINISH = """
redis.call('XACK', KEYS[4], ARGV[1], ARGV[2])
if redis.call('XDEL', KEYS[4], ARGV[2]) == 0 then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[3])
redis.call('HINCRBY', KEYS[1], ARGV[4], 1)
local counts = redis.call('HMGET', KEYS[1], 'total', 'completed', 'failed')
if tonumber(counts[2]) + tonumber(counts[3]) == tonumber(counts[1]) then
  redis.call('HSET', KEYS[1], 'state', ARGV[5])
  for i = 1, 3 do redis.call('EXPIRE', KEYS[i], ARGV[6]) end
end
return 1
"""

# KEYS as above; ARGV group, RUNNING, CANCELLED, TTL.
_CANCEL = """
if redis.call('HGET', KEYS[1], 'state') ~= ARGV[2] then return 0 end
for _, id in ipairs(redis.call('LRANGE', KEYS[3], 0, -1)) do
  redis.call('XACK', KEYS[4], ARGV[1], id)
  redis.call('XDEL', KEYS[4], id)
end
redis.call('HSET', KEYS[1], 'state', ARGV[3])
for i = 1, 3 do redis.call('EXPIRE', KEYS[i], ARGV[4]) end
return 1
"""


@dataclass(frozen=True)
class Entry:
    """One item on its way: what the Stream says of it."""

    entry_id: bytes
    job_id: str
    custom_id: str
    request: WorkerServiceGenerateRequest


@dataclass(frozen=True)
class JobRecord:
    state: jobs_pb2.JobState
    counts: jobs_pb2.JobCounts


@dataclass(frozen=True)
class JobStore:
    """All methods raise StoreUnavailableError if Redis does not answer."""

    redis: Any
    queue_items_max: int
    retention_s: int

    async def submit(
        self,
        job_id: str,
        fingerprint: str,
        items: Sequence[tuple[str, WorkerServiceGenerateRequest]],
    ) -> None:
        """Queues all `items` or none; the same submission again changes nothing."""
        flat = [part for name, work in items for part in (name, work.SerializeToString())]
        with store_errors():
            outcome = await self.redis.eval(
                _SUBMIT,
                3,
                keys.job(job_id),
                keys.job_entries(job_id),
                keys.BE_STREAM,
                fingerprint,
                self.queue_items_max,
                int(jobs_pb2.JOB_STATE_RUNNING),
                job_id,
                *flat,
            )
        if outcome == b"other":
            raise RequestExistsError(f"job {job_id!r} exists with other items", field="job_id")
        if outcome == b"full":
            raise QueueFullError(
                f"{len(items)} more items would be over the queue's {self.queue_items_max}",
                retry_after_s=10.0,
            )

    async def get(self, job_id: str) -> JobRecord:
        with store_errors():
            values = await self.redis.hmget(
                keys.job(job_id), "state", "total", "completed", "failed"
            )
        if values[0] is None:
            raise JobNotFoundError(f"job {job_id!r} is not known", metadata={"job_id": job_id})
        state, total, completed, failed = map(int, values)
        counts = jobs_pb2.JobCounts(total=total, completed=completed, failed=failed)
        return JobRecord(cast(jobs_pb2.JobState, state), counts)

    async def results(self, job_id: str, offset: int, count: int) -> list[jobs_pb2.JobResult]:
        with store_errors():
            packed = await self.redis.lrange(keys.job_results(job_id), offset, offset + count - 1)
        return [jobs_pb2.JobResult.FromString(result) for result in packed]

    async def cancel(self, job_id: str) -> None:
        """Takes every item without a result out of the queue; an ended job stays as it is."""
        with store_errors():
            await self.redis.eval(
                _CANCEL,
                4,
                *self._job_keys(job_id),
                keys.BE_GROUP,
                int(jobs_pb2.JOB_STATE_RUNNING),
                int(jobs_pb2.JOB_STATE_CANCELLED),
                self.retention_s,
            )

    async def finish(self, entry: Entry, result: jobs_pb2.JobResult) -> bool:
        """Stores an item's result; False if it has one already or its job was cancelled."""
        with store_errors():
            stored = await self.redis.eval(
                _FINISH,
                4,
                *self._job_keys(entry.job_id),
                keys.BE_GROUP,
                entry.entry_id,
                result.SerializeToString(),
                "failed" if result.error else "completed",
                int(jobs_pb2.JOB_STATE_COMPLETED),
                self.retention_s,
            )
        return bool(stored)

    async def take(self, consumer: str, count: int) -> list[Entry]:
        """Waits up to READ_BLOCK_MS for items that no control plane has yet."""
        with store_errors():
            try:
                answer = await self.redis.xreadgroup(
                    keys.BE_GROUP, consumer, {keys.BE_STREAM: ">"}, count, READ_BLOCK_MS
                )
            except redis.exceptions.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                await self._create_group()
                return []
        return [_entry(*raw) for _, entries in answer or [] for raw in entries]

    async def reclaim(self, consumer: str, idle_s: float, count: int) -> list[Entry]:
        """Takes over items whose control plane has not renewed them for `idle_s`."""
        with store_errors():
            try:
                answer = await self.redis.xautoclaim(
                    keys.BE_STREAM, keys.BE_GROUP, consumer, int(idle_s * 1e3), "0-0", count
                )
            except redis.exceptions.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                return []
        return [_entry(*raw) for raw in answer[1]]

    async def renew(self, consumer: str, entry_ids: Sequence[bytes]) -> set[bytes]:
        """Keeps items from being reclaimed; returns those that are still to be done."""
        if not entry_ids:
            return set()
        return await self._claim(consumer, entry_ids)

    async def release(self, consumer: str, entry_ids: Sequence[bytes]) -> None:
        """Lets the next control plane that looks reclaim items without waiting."""
        if entry_ids:
            await self._claim(consumer, entry_ids, idle=3_600_000)

    async def _claim(self, consumer: str, entry_ids: Sequence[bytes], **options: int) -> set[bytes]:
        with store_errors():
            return set(
                await self.redis.xclaim(
                    keys.BE_STREAM, keys.BE_GROUP, consumer, 0, entry_ids, justid=True, **options
                )
            )

    async def _create_group(self) -> None:
        try:
            await self.redis.xgroup_create(keys.BE_STREAM, keys.BE_GROUP, "0", mkstream=True)
        except redis.exceptions.ResponseError as error:
            if "BUSYGROUP" not in str(error):  # another control plane was faster
                raise

    @staticmethod
    def _job_keys(job_id: str) -> tuple[str, str, str, str]:
        entries = keys.job_entries(job_id)
        return keys.job(job_id), keys.job_results(job_id), entries, keys.BE_STREAM


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    request = WorkerServiceGenerateRequest.FromString(fields[b"request"])
    return Entry(entry_id, fields[b"job"].decode(), fields[b"custom_id"].decode(), request)
