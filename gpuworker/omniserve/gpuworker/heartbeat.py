"""The worker's heartbeat in Redis: where it is and how it fares. Redis may come and go."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable

import redis.exceptions

from omniserve import keys, redis_access
from omniserve.gpuworker.settings import WorkerSettings
from omniserve.internal.v1 import worker_pb2

_log = logging.getLogger(__name__)
_PERIOD_S = 0.2
# Longest wait for Redis: a heartbeat that comes later than that is of no use.
_ANSWER_S = 1.0

Report = Callable[[], Awaitable[worker_pb2.GetWorkerStatusResponse | None]]


class Heartbeat:
    """Writes one key. Connects on first use."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Raises SettingsError for a URL or files that cannot be used."""
        self._redis = redis_access.connect(
            settings.redis_url,
            settings.redis_password_file,
            settings.redis_ca_file,
            answer_s=_ANSWER_S,
        )
        self._key = keys.worker(settings.worker_id)
        self._address = settings.advertise or settings.listen
        self._reached = True

    async def run(self, report: Report) -> None:
        """Writes what `report` returns, unless that is None, until cancelled."""
        try:
            while True:
                status = await report()
                if status is not None:
                    await self._beat(status)
                    redis_access.raise_if_cancelled()
                await asyncio.sleep(_PERIOD_S)
        finally:
            with contextlib.suppress(redis.exceptions.RedisError, OSError):
                await self._redis.delete(self._key)
            await self._redis.aclose()

    async def _beat(self, status: worker_pb2.GetWorkerStatusResponse) -> None:
        packed = base64.b64encode(status.SerializeToString()).decode()
        beat = json.dumps({"address": self._address, "status": packed})
        try:
            await self._redis.set(self._key, beat, px=int(keys.HEARTBEAT_TTL_S * 1000))
        except (redis.exceptions.RedisError, OSError) as error:
            if self._reached:
                _log.warning("redis lost: %s", error)
            self._reached = False
            return
        if not self._reached:
            _log.info("redis is back")
        self._reached = True
