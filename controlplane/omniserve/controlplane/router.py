"""Which workers live, how loaded each is, and a channel to each.

Reads the heartbeats that workers write to Redis. While Redis is unreachable the last known
workers stay: a worker that is gone as well shows itself by failing its calls.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from omniserve import keys
from omniserve.channel import RECONNECT_OPTIONS
from omniserve.controlplane.admission import Load
from omniserve.controlplane.store import store_errors
from omniserve.errors import NoWorkerError, StoreUnavailableError
from omniserve.internal.v1 import worker_pb2, worker_pb2_grpc
from omniserve.v1 import status_pb2

log = logging.getLogger(__name__)

SCAN_S = 0.2
# Redis may take this long for one: several answers, each with its own time limit.
SCAN_LATE_S = 10.0
# How often to look for new workers among all keys, which costs more than to read known ones.
DISCOVER_S = 1.0
DISCOVER_KEYS = 1000
# Oldest that a heartbeat's telemetry can be when it is read: workers write five a second.
TELEMETRY_AGE_S = 0.2
# Redis may have been restarted empty: its workers show up again within this time.
MISSING_GRACE_S = 1.0
CHANNEL_OPTIONS = [
    *RECONNECT_OPTIONS,
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]


@dataclass(eq=False)
class Submission:
    """One LS request that this process sent and that has no first token yet."""

    sent_s: float
    prompt_tokens: int


@dataclass(eq=False)
class Worker:
    """A worker as last heard of. Times are of the router's clock."""

    worker_id: str
    address: str
    channel: Any
    stub: Any
    report: worker_pb2.GetWorkerStatusResponse
    reported_s: float
    seen_s: float
    prefilling: list[Submission] = field(default_factory=list)
    be_in_flight: int = 0

    @property
    def telemetry(self) -> status_pb2.Telemetry:
        return self.report.status.telemetry

    def load(self, ls_running_max: int) -> Load:
        """LS load: the telemetry, and what was sent too late to be in it."""
        telemetry = self.telemetry
        known_s = self.reported_s - TELEMETRY_AGE_S
        unseen = [s.prompt_tokens for s in self.prefilling if s.sent_s > known_s]
        return Load(
            ls_requests=telemetry.ls_running + telemetry.ls_waiting + len(unseen),
            ls_prefill_tokens_waiting=telemetry.ls_prefill_tokens_waiting + sum(unseen),
            prefill_token_ms=telemetry.prefill_token_ms,
            decode_pass_ms=telemetry.decode_pass_ms,
            ls_running_max=ls_running_max,
        )


class Router:
    """The live workers of one model."""

    def __init__(
        self, redis: Any, model: str, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._redis = redis
        self._model = model
        self._clock_s = clock_s
        self._workers: dict[str, Worker] = {}
        self._discovered_s = 0.0
        self._scanned_s = -math.inf
        self.redis_reachable = False

    @property
    def current(self) -> bool:
        """Whether Redis answered the last scan, and that was lately."""
        return self.redis_reachable and self._clock_s() - self._scanned_s < SCAN_LATE_S

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    def find(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def pick(self, cost: Callable[[Worker], float], avoid: Collection[str] = frozenset()) -> Worker:
        """Returns the cheapest worker; one to `avoid`, or that is about to end, only if there is no
        other. Raises NoWorkerError."""
        if not self._workers:
            raise NoWorkerError(f"no live worker serves {self._model}", retry_after_s=1.0)

        def key(worker: Worker) -> tuple[bool, float]:
            return worker.worker_id in avoid or worker.report.draining, cost(worker)

        return min(self.workers, key=key)

    @contextmanager
    def prefilling(self, worker: Worker, prompt_tokens: int) -> Iterator[Callable[[], None]]:
        """Counts an LS request as sent until its first token: call what this yields then."""
        submission = Submission(self._clock_s(), prompt_tokens)
        worker.prefilling.append(submission)

        def answered() -> None:
            if submission in worker.prefilling:
                worker.prefilling.remove(submission)

        try:
            yield answered
        finally:
            answered()

    async def run(self) -> None:
        """Keeps the map of workers up to date, until cancelled."""
        while True:
            await self.scan()
            await asyncio.sleep(SCAN_S)

    async def scan(self) -> None:
        try:
            with store_errors():
                names = await self._heartbeat_keys()
                values = await self._redis.mget(names) if names else []
        except StoreUnavailableError as error:
            if self.redis_reachable:
                log.warning("redis lost: %s", error.message)
            self.redis_reachable = False
            return
        now_s = self._scanned_s = self._clock_s()
        if not self.redis_reachable:
            # Heartbeats may have run out meanwhile: workers get their time to write new ones.
            for worker in self.workers:
                worker.seen_s = now_s
        self.redis_reachable = True
        for value in values:
            if value is not None:
                self._hear(value, now_s)
        for worker in self.workers:
            if now_s - worker.seen_s > MISSING_GRACE_S:
                log.warning("worker %s gone", worker.worker_id)
                del self._workers[worker.worker_id]
                # Streams still running on it end by themselves, or break when it is closed.
                _spawn_close(worker.channel)

    async def close(self) -> None:
        for worker in self.workers:
            await worker.channel.close(None)

    async def _heartbeat_keys(self) -> list[str | bytes]:
        if self._workers and self._clock_s() - self._discovered_s < DISCOVER_S:
            return [keys.worker(worker_id) for worker_id in self._workers]
        scan = self._redis.scan_iter(keys.WORKERS_PATTERN, count=DISCOVER_KEYS)
        names = [key async for key in scan]
        self._discovered_s = self._clock_s()
        return names

    def _hear(self, heartbeat: bytes, now_s: float) -> None:
        try:
            record = json.loads(heartbeat)
            address = str(record["address"])
            report = worker_pb2.GetWorkerStatusResponse.FromString(
                base64.b64decode(record["status"], validate=True)
            )
        except (ValueError, KeyError, TypeError, binascii.Error, DecodeError) as error:
            log.warning("heartbeat unreadable: %r", error)
            return
        if report.status.model != self._model:
            log.debug("worker %s serves %s", report.status.worker_id, report.status.model)
            return
        worker = self._workers.get(report.status.worker_id)
        if worker is None or worker.address != address:
            if worker is not None:
                _spawn_close(worker.channel)
            log.info("worker %s at %s", report.status.worker_id, address)
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            self._workers[report.status.worker_id] = Worker(
                report.status.worker_id, address, channel, stub, report, now_s, now_s
            )
            return
        if report != worker.report:
            worker.report = report
            worker.reported_s = now_s
        worker.seen_s = now_s


_closing: set[asyncio.Task[None]] = set()


def _spawn_close(channel: Any) -> None:
    task = asyncio.ensure_future(channel.close(10.0))
    _closing.add(task)
    task.add_done_callback(_closing.discard)
