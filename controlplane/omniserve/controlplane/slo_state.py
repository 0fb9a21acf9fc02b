"""LS attainment over a sliding window, in one-second buckets in Redis shared by all processes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from omniserve import keys
from omniserve.controlplane.store import store_errors
from omniserve.errors import StoreUnavailableError

log = logging.getLogger(__name__)

_TTL_SLACK_S = 5
_RECORD = """
redis.call('HINCRBY', KEYS[1], 'total', 1)
redis.call('HINCRBY', KEYS[1], 'met', ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""


@dataclass
class Timing:
    """One LS request's times, in seconds of the monotonic clock; `started_s` is its arrival."""

    started_s: float
    ttft_ms_max: float
    tpot_ms_max: float
    first_s: float | None = None
    last_s: float = 0.0
    tokens: int = 0
    failed: bool = False
    """It ended with FINISH_REASON_ERROR."""

    def tokens_at(self, now_s: float, count: int) -> None:
        if self.first_s is None:
            self.first_s = now_s
        self.last_s = now_s
        self.tokens += count

    @property
    def ttft_ms(self) -> float | None:
        return None if self.first_s is None else (self.first_s - self.started_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """None with fewer than two tokens: such a request is judged by its TTFT alone."""
        if self.first_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.first_s) * 1e3 / (self.tokens - 1)

    def met(self) -> bool:
        if self.failed or self.ttft_ms is None or self.ttft_ms > self.ttft_ms_max:
            return False
        return self.tpot_ms is None or self.tpot_ms <= self.tpot_ms_max

    def missed_by(self, now_s: float) -> bool:
        """Whether an unfinished request is already too late for its first token."""
        answered_s = now_s if self.first_s is None else self.first_s
        return (answered_s - self.started_s) * 1e3 > self.ttft_ms_max


@dataclass(frozen=True)
class Window:
    """LS requests that ended in a stretch of time."""

    total: int = 0
    met: int = 0

    @property
    def attainment(self) -> float:
        return self.met / self.total if self.total else 1.0


@dataclass
class SloState:
    """Records and reads attainment. Recording never fails or delays a request."""

    redis: Any
    window_s: int
    wall_s: Callable[[], float] = time.time
    _pending: set[asyncio.Task[None]] = field(default_factory=set)

    def record(self, met: bool) -> None:
        task = asyncio.ensure_future(self._record(met))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def windows(self, *lengths_s: int) -> list[Window]:
        """Returns the last `lengths_s` seconds, the running one included, each as a Window."""
        now = int(self.wall_s())
        longest = max(lengths_s)
        with store_errors():
            async with self.redis.pipeline(transaction=False) as pipe:
                for age in range(longest):
                    pipe.hmget(keys.ls_second(now - age), "total", "met")
                buckets = [(int(t or 0), int(m or 0)) for t, m in await pipe.execute()]
        return [
            Window(sum(t for t, _ in buckets[:length]), sum(m for _, m in buckets[:length]))
            for length in lengths_s
        ]

    async def _record(self, met: bool) -> None:
        key = keys.ls_second(int(self.wall_s()))
        try:
            with store_errors():
                await self.redis.eval(_RECORD, 1, key, int(met), self.window_s + _TTL_SLACK_S)
        except StoreUnavailableError as error:
            log.info("slo sample lost: %s", error.message)
