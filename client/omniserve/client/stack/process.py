"""One supervised process: start, health, last words, stop. Used by the supervisor's thread."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

LAUNCHER = Path(__file__).with_name("launch.py")
LAST_LINES = 10
PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class ProcessSpec:
    """What to run and how to see that it works."""

    name: str
    """Shown to people, and the name of the log."""
    command: tuple[str, ...]
    """Program and arguments."""
    address: str
    """"host:port" that it listens on."""
    probe: Callable[[str], bool]
    """Whether the process at an address is ready and making progress."""
    restart: bool
    """Whether its death is mended by starting it again."""


class ManagedProcess:
    """Lives as long as the thread that starts it; see launch.py."""

    def __init__(self, spec: ProcessSpec, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self.restarts = 0
        self._popen: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        """Process id, also of the group that its children are in."""
        return self._popen.pid if self._popen is not None else 0

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._popen.poll() if self._popen is not None else None

    def start(self) -> None:
        """Starts the process; its output goes to the end of the log."""
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            # -I -S: no site packages, no environment, so that it takes milliseconds.
            launcher = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid())]
            self._popen = subprocess.Popen(
                [*launcher, *self.spec.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the supervisor's to handle, in order
            )

    def healthy(self) -> bool:
        """Asks the process; False also while it does not listen yet."""
        return self.spec.probe(self.spec.address)

    def last_lines(self) -> list[str]:
        """Returns the last lines that this run of the process wrote."""
        with self.log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, log.tell() - 8192))
            text = log.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]

    def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s`; children that it left behind go too."""
        if self._popen is None:
            return
        self._popen.terminate()
        try:
            self._popen.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._signal_group(signal.SIGKILL)
            self._popen.wait()
        self._signal_group(signal.SIGKILL)

    def reap_children(self) -> None:
        """Kills what a dead process left in its group."""
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def probe_grpc(address: str) -> bool:
    """Whether the server's grpc.health.v1 says SERVING."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def probe_redis(address: str) -> bool:
    """Whether a Redis answers PING; its client library is not needed for that."""
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def wait_any_exit(processes: list[ManagedProcess], seconds: float) -> ManagedProcess | None:
    """Returns the first process found dead within `seconds`, or None."""
    deadline = time.monotonic() + seconds
    while True:
        for process in processes:
            if process.returncode is not None:
                return process
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.05)
