"""Starts the stack, watches it, mends what can be mended, and stops all of it."""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import grpc

from omniserve.client.stack import host
from omniserve.client.stack.plan import StackPlan, plan_stack
from omniserve.client.stack.process import ManagedProcess, wait_any_exit
from omniserve.client.stack.settings import StackSettings
from omniserve.errors import BY_REASON, OmniServeError

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 8.0
MAX_RESTARTS = 5
# A process that lived this long has started well: its count of restarts begins anew.
SETTLED_S = 30.0
TICK_S = 0.2
_TYPED_LINE = re.compile(r"[\w.-]+: ([A-Z_]+): (.+)")


class ProcessFailedError(OmniServeError):
    """A process of the stack died, or was not ready in time; the message has its last lines."""

    reason = "PROCESS_FAILED"
    grpc_code = grpc.StatusCode.INTERNAL


@dataclass(frozen=True)
class RunningProcess:
    """What a person wants to know about a process of the stack."""

    name: str
    """Also the name of its log."""
    pid: int
    """Process id."""
    address: str
    """ "host:port"."""


class Stack:
    """All processes of a local deployment. As a context manager it starts and stops them.

    One thread starts, watches, restarts and stops all processes: they get SIGKILL when the
    thread that started them ends, so that none outlives a killed supervisor.
    """

    def __init__(self, settings: StackSettings) -> None:
        self.settings = settings
        self._stopping = threading.Event()
        self._ready = threading.Event()
        # Waited for instead of the thread: a join() that Ctrl-C interrupts makes Python 3.11 take
        # a running thread for an ended one.
        self._ended = threading.Event()
        self._failure: Exception | None = None
        self._plan: StackPlan | None = None
        self._tiers: list[list[ManagedProcess]] = []
        self._started_s: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="supervisor")

    @property
    def address(self) -> str:
        """ "host:port" of the control plane, once started."""
        if self._plan is None:
            raise RuntimeError("the stack has not been started")
        return self._plan.address

    @property
    def failure(self) -> Exception | None:
        """Why the stack ended by itself; None while it works."""
        return self._failure

    def processes(self) -> list[RunningProcess]:
        """Returns the processes in the order of their start."""
        return [RunningProcess(p.spec.name, p.pid, p.spec.address) for t in self._tiers for p in t]

    def start(self) -> None:
        """Returns when all processes are healthy. Raises typed errors, with nothing left behind."""
        self._thread.start()
        try:
            self._ready.wait()
        except BaseException:  # Ctrl-C while starting
            self.stop()
            raise
        if self._failure is not None:
            self._ended.wait()
            raise self._failure

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the stack has ended by itself; False if it has not within `timeout_s`."""
        return self._ended.wait(timeout_s)

    def stop(self) -> None:
        """Stops all processes in order and removes what they shared. Repeating is harmless."""
        self._stopping.set()
        if self._thread.ident is not None:  # was started
            self._ended.wait()

    def __enter__(self) -> Stack:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            self._failure = error
        finally:
            self._ready.set()
            self._ended.set()

    def _serve(self) -> None:
        settings = self.settings
        run_dir = Path(settings.run_dir).resolve()
        run_dir.mkdir(parents=True, exist_ok=True)
        needed = settings.attention_servers * (settings.arena_bytes + host.RING_BYTES)
        shm_dir = host.ShmDir(Path(settings.shm_dir), needed)
        try:
            self._plan = plan_stack(settings, shm_dir.path)
            self._start_tiers(self._plan, run_dir)
            self._ready.set()
            while not self._stopping.is_set():
                self._watch()
        finally:
            for tier in reversed(self._tiers):
                for process in reversed(tier):
                    process.stop(settings.stop_grace_s)
            shm_dir.remove()

    def _start_tiers(self, plan: StackPlan, run_dir: Path) -> None:
        for specs in plan.tiers:
            tier = [ManagedProcess(spec, run_dir / f"{spec.name}.log") for spec in specs]
            self._tiers.append(tier)
            for process in tier:
                process.log_path.unlink(missing_ok=True)
                self._start(process)
            self._wait_healthy(tier)

    def _start(self, process: ManagedProcess) -> None:
        process.start()
        self._started_s[process.spec.name] = time.monotonic()

    def _wait_healthy(self, tier: list[ManagedProcess]) -> None:
        deadline_s = time.monotonic() + self.settings.start_timeout_s
        waiting = list(tier)
        while waiting and not self._stopping.is_set():
            dead = wait_any_exit([p for t in self._tiers for p in t], TICK_S)
            if dead is not None:
                raise _died(dead)
            waiting = [p for p in waiting if not p.healthy()]
            if waiting and time.monotonic() > deadline_s:
                raise _failed(
                    waiting[0], f"was not ready within {self.settings.start_timeout_s:g} s"
                )

    def _watch(self) -> None:
        """Mends the first dead process, or returns after a tick."""
        dead = wait_any_exit([p for t in self._tiers for p in t], TICK_S)
        if dead is None or self._stopping.is_set():
            return
        if time.monotonic() - self._started_s[dead.spec.name] > SETTLED_S:
            dead.restarts = 0
        if not dead.spec.restart or dead.restarts >= MAX_RESTARTS:
            raise _died(dead)
        backoff_s = min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2**dead.restarts)
        log.warning("%s; starting it again in %g s", _died(dead).message, backoff_s)
        dead.reap_children()
        if self._stopping.wait(backoff_s):
            return
        dead.restarts += 1
        self._start(dead)


def _died(process: ManagedProcess) -> OmniServeError:
    """Returns the typed error that the process printed, or one with its exit and last lines."""
    lines = process.last_lines()
    typed = _TYPED_LINE.fullmatch(lines[-1]) if lines else None
    if typed and typed[1] in BY_REASON:
        return BY_REASON[typed[1]](f"{process.spec.name}: {typed[2]}")
    return _failed(process, f"died with exit status {process.returncode}")


def _failed(process: ManagedProcess, what: str) -> ProcessFailedError:
    last = "".join(f"\n  {line}" for line in process.last_lines())
    return ProcessFailedError(f"{process.spec.name} {what}; {process.log_path} ends with:{last}")
