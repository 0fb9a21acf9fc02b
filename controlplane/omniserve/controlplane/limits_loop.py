"""The outer loop: attainment in, limits out to Redis and the workers.

Every control plane follows the limits; the one that holds the lock decides them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc

from omniserve import keys
from omniserve.controlplane.limits import Limits, State, decide
from omniserve.controlplane.router import Router, Worker
from omniserve.controlplane.slo_state import SloState, Window
from omniserve.controlplane.store import store_errors
from omniserve.errors import StoreUnavailableError
from omniserve.internal.v1 import worker_pb2
from omniserve.v1 import status_pb2

log = logging.getLogger(__name__)

# What counts as now: the running second and the one before it.
LATEST_S = 2
# A worker may have restarted with its own defaults, under the same name and address.
PUSH_AGAIN_S = 5.0
PUSH_TIMEOUT_S = 1.0

# Takes the lock or renews it; returns whether it is ours.
_LOCK = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""


@dataclass
class LimitsView:
    """The limits in force and the attainment behind them, as this process last knew them."""

    limits: Limits = field(default_factory=Limits)
    window: Window = field(default_factory=Window)


class LimitsLoop:
    def __init__(
        self,
        redis: Any,
        router: Router,
        slo_state: SloState,
        view: LimitsView,
        *,
        target: float,
        interval_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._router = router
        self._slo_state = slo_state
        self._view = view
        self._target = target
        self._interval_s = interval_s
        self._clock_s = clock_s
        self._holder = uuid.uuid4().hex
        self._leading = False
        self._changed_s = clock_s()
        self._pushed: dict[str, tuple[Limits, str, float]] = {}

    async def run(self) -> None:
        """Looks, decides and publishes, until cancelled."""
        while True:
            try:
                await self.step()
            except StoreUnavailableError as error:
                self._leading = False
                log.info("limits stay as they are: %s", error.message)
            await asyncio.sleep(self._interval_s)

    async def step(self) -> None:
        leading = await self._lead()
        self._view.window, latest = await self._slo_state.windows(
            self._slo_state.window_s, LATEST_S
        )
        if not (leading and self._leading):
            # Follow, or take over from where the last leader was.
            await self._follow()
        self._leading = leading
        if not leading:
            return
        now_s = self._clock_s()
        state = State(self._view.limits, self._changed_s, self._target, self._view.window, latest)
        limits = decide(state, now_s)
        if limits != self._view.limits:
            log.info("limits %s at attainment %.3f", limits, self._view.window.attainment)
            with store_errors():
                await self._redis.set(keys.LIMITS, json.dumps(asdict(limits)))
            self._view.limits = limits
            self._changed_s = now_s
        await asyncio.gather(*(self._push(worker, now_s) for worker in self._router.workers))

    async def _lead(self) -> bool:
        with store_errors():
            ttl_ms = int(keys.LIMITS_LOCK_TTL_S * 1e3)
            return bool(await self._redis.eval(_LOCK, 1, keys.LIMITS_LOCK, self._holder, ttl_ms))

    async def _follow(self) -> None:
        with store_errors():
            stored = await self._redis.get(keys.LIMITS)
        if stored is None:
            return
        limits = Limits(**json.loads(stored))
        if limits != self._view.limits:
            self._view.limits = limits
            self._changed_s = self._clock_s()

    async def _push(self, worker: Worker, now_s: float) -> None:
        limits = self._view.limits
        last = self._pushed.get(worker.worker_id)
        if last and last[:2] == (limits, worker.address) and now_s - last[2] < PUSH_AGAIN_S:
            return
        try:
            request = worker_pb2.SetLimitsRequest(limits=to_proto(limits))
            await worker.stub.SetLimits(request, timeout=PUSH_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            log.info("limits not taken by %s: %s", worker.worker_id, error.code().name)
            return
        self._pushed[worker.worker_id] = (limits, worker.address, now_s)


def to_proto(limits: Limits) -> status_pb2.Limits:
    return status_pb2.Limits(**asdict(limits))
