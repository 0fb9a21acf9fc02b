"""CPU time of the processes under test, so that a figure on a shared host can be explained."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from support.worker_stack import WorkerStack


class CpuTime:
    """Cores that each process of a stack, and this client, kept busy since the start."""

    def __init__(self, stack: WorkerStack) -> None:
        self._pids = {
            "engine": [stack.engine_pid()],
            "front": [stack.worker.process.pid],
            "servers": [server.process.pid for server in stack.servers],
            "client": [os.getpid()],
        }
        self._start_s = time.perf_counter()
        self._start = self._busy_s()

    def cores(self) -> dict[str, float]:
        """Mean number of cores that each has used."""
        elapsed_s = time.perf_counter() - self._start_s
        return {
            name: round((busy_s - self._start[name]) / elapsed_s, 3)
            for name, busy_s in self._busy_s().items()
        }

    def _busy_s(self) -> Mapping[str, float]:
        return {name: sum(map(_busy_s, pids)) for name, pids in self._pids.items()}


def _busy_s(pid: int) -> float:
    """CPU time of all threads of a process, to the nanosecond: of what Linux calls its CPU clock.

    The ticks in /proc are too coarse for work that comes in bursts of less.
    """
    return time.clock_gettime(~pid << 3 | 2)
