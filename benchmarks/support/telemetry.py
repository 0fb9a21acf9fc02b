"""What the worker says of itself, read so that it covers what has just happened."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from support.stack import wait_for
from support.worker_stack import WorkerStack

from omniserve.v1 import status_pb2

PATHS = ("device_resident", "boarded", "be_only")
# The engine publishes ten times a second.
_PERIOD_S = 0.1


def settled(stack: WorkerStack) -> status_pb2.Telemetry:
    """Returns telemetry that was published after this call began."""
    time.sleep(3 * _PERIOD_S)
    return stack.telemetry()


def wait_empty(stack: WorkerStack) -> None:
    """Waits until the worker has no request left."""
    wait_for("an idle worker", lambda: _requests(settled(stack)) == 0)


def tokens_by_path(before: status_pb2.Telemetry, after: status_pb2.Telemetry) -> dict[str, int]:
    """BE output tokens between two readings, by the path that they took."""
    return {
        path: getattr(after.be_tokens_by_path, path) - getattr(before.be_tokens_by_path, path)
        for path in PATHS
    }


class LagSampler:
    """Reads, while its block runs, how many computed BE tokens no arena has yet."""

    def __init__(self, stack: WorkerStack) -> None:
        self.lag_tokens: list[int] = []
        self._stack = stack
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> LagSampler:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self.lag_tokens.append(self._stack.telemetry().kv_checkpoint_lag_tokens)


def _requests(telemetry: status_pb2.Telemetry) -> int:
    t = telemetry
    return t.ls_running + t.ls_waiting + t.be_device_resident + t.be_waiting + t.rows_parked
