"""Which worker has which request, shared by all control planes so that any can resume a stream."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass, field
from typing import Any

from omniserve import keys
from omniserve.controlplane.store import store_errors
from omniserve.errors import StoreUnavailableError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """`base`: generated tokens that are part of the prompt the worker has."""

    worker_id: str
    base: int


@dataclass
class Placements:
    redis: Any
    _pending: set[asyncio.Task[None]] = field(default_factory=set)

    def put(self, request_id: str, placement: Placement) -> None:
        """Never fails or delays the request: without it only resuming elsewhere is lost."""
        task = asyncio.ensure_future(self._put(request_id, placement))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def get(self, request_id: str) -> Placement | None:
        """Raises StoreUnavailableError."""
        with store_errors():
            value = await self.redis.get(keys.request(request_id))
        if value is None:
            return None
        record = json.loads(value)
        return Placement(record["worker"], record["base"])

    async def _put(self, request_id: str, placement: Placement) -> None:
        value = json.dumps({"worker": placement.worker_id, "base": placement.base})
        try:
            with store_errors():
                await self.redis.set(keys.request(request_id), value, ex=int(keys.REQUEST_TTL_S))
        except StoreUnavailableError as error:
            log.info("placement of %s lost: %s", request_id, error.message)
