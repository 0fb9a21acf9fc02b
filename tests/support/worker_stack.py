"""A GPU worker and its attention servers as real processes, and calls to the worker."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.signals import send
from support.stack import MODEL_PATH, free_port, wait_for

from omniserve.errors import RequestNotFoundError, from_rpc_error
from omniserve.internal.v1 import worker_pb2, worker_pb2_grpc
from omniserve.shm import layout
from omniserve.v1 import status_pb2, types_pb2

MODEL = layout.Geometry(
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    dtype="float32",
    kv_dtype="float32",
    page_tokens=32,
    max_sequences=64,
    max_sequence_tokens=8192,
    slots=64 + 2048,
)
"""What a worker of the test model asks of an attention server (float32 is the larger)."""
START_S = 180.0
"""How long a worker may take to load and to profile its device on a busy host."""
ARENA_BYTES = layout.arena_bytes(MODEL, MODEL.max_pages_per_sequence + 64)


class Service:
    """One process; its stderr goes to `log`. `restart` runs the same command again."""

    def __init__(self, module: str, flags: dict[str, Any], folder: Path, name: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.log = folder / f"{name}.log"
        arguments = {"listen": self.address, "shm-dir": folder} | flags
        self._command = [sys.executable, "-m", module]
        self._command += [_flag(name, value) for name, value in arguments.items()]
        self.restart()

    def restart(self) -> None:
        # For workers that are the tests' own.
        folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self._command, stderr=log, env=environment)

    @property
    def tail(self) -> str:
        return f"{' '.join(self._command)}\n{self.log.read_text()[-3000:]}"

    @property
    def children(self) -> dict[int, str]:
        """Command lines of the process's children by pid."""
        pid = self.process.pid
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return {int(p): Path(f"/proc/{p}/cmdline").read_text().replace("\0", " ") for p in found}

    def kill(self) -> None:
        self.process.kill()  # also ends a stopped process
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.terminate()
        return self.process.wait(60.0)


class Stream:
    """One Generate call and what it has sent so far. Iteration is the caller's: `read`."""

    def __init__(self, call: Any, request_id: str) -> None:
        self.request_id = request_id
        self.call = call
        self.tokens: list[int] = []
        self.logprobs: list[types_pb2.TokenLogprobs] = []
        self.finish_reason = types_pb2.FINISH_REASON_UNSPECIFIED
        self.cached_tokens = 0

    def read(self, tokens: int) -> None:
        """Returns when `tokens` tokens have come in all."""
        while len(self.tokens) < tokens:
            message = next(self.call)
            assert not message.finish_reason, f"ended after {len(self.tokens)} tokens"
            self.tokens.extend(message.token_ids)
            self.logprobs.extend(message.logprobs)

    def finish(self) -> list[int]:
        """Waits for the end; returns all tokens."""
        for message in self.call:
            self.tokens.extend(message.token_ids)
            self.logprobs.extend(message.logprobs)
            self.finish_reason = message.finish_reason
            self.cached_tokens = message.cached_tokens
        return self.tokens


class WorkerStack:
    """`servers` attention servers and a worker on free ports and a private folder on tmpfs.

    Flags are named as on the command line, without the dashes. All is gone when the block ends;
    if nothing failed in it, the engine has looked its pools over a last time.
    """

    running: ClassVar[list[WorkerStack]] = []

    def __init__(
        self,
        *,
        servers: int = 2,
        server_flags: Mapping[str, Any] = MappingProxyType({}),
        worker_flags: Mapping[str, Any] = MappingProxyType({}),
        arena_bytes: int = ARENA_BYTES,
        worker_module: str = "omniserve.gpuworker",
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="omniserve-test-", dir="/dev/shm"))
        self.servers: list[Service] = []
        self.services: list[Service] = []
        try:
            for index in range(servers):
                flags = {
                    "server-id": f"a{index}",
                    "arena-bytes": arena_bytes,
                    "fault-seed": index,
                    "background": False,  # there it may stand for seconds on a busy machine
                }
                flags |= server_flags
                self.servers.append(self._start("omniserve.cpuattn", flags, f"a{index}"))
            addresses = ",".join(server.address for server in self.servers)
            flags = {
                "model-path": MODEL_PATH,
                "dtype": "float32",
                "threads": 1,  # two would wait for each other whenever a server has a core
                "be-sequences-max": MODEL.max_sequences,
                "be-stream-interval-s": 0.0,  # tests step in between two tokens
                "attention-servers": addresses,
            }
            self.worker = self._start(worker_module, flags | dict(worker_flags), "worker")
            self.channel = grpc.insecure_channel(self.worker.address)
            self.stub = worker_pb2_grpc.WorkerServiceStub(self.channel)
            wait_for("a serving worker", self.is_serving, START_S)
        except BaseException:
            self._show_logs()
            self.close()
            raise

    def __enter__(self) -> WorkerStack:
        self.running.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.running.remove(self)
        try:
            if error is not None:
                self._show_logs()
            elif self.worker.process.poll() is None:
                self.worker.terminate()
                # A busy host may have it killed before it has ended: that is another status.
                assert "the engine ended with status 1" not in self.worker.tail, self.worker.tail
        finally:
            self.close()

    def close(self) -> None:
        for service in self.services:
            if service.process.poll() is None:
                service.kill()
        shutil.rmtree(self.folder)

    def is_serving(self) -> bool:
        for service in self.services:
            assert service.process.poll() is None, service.tail
        stub = health_pb2_grpc.HealthStub(self.channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest())
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def start(
        self,
        prompt: Sequence[int],
        max_tokens: int = 64,
        *,
        best_effort: bool = False,
        channel: grpc.Channel | None = None,
        request_id: str = "",
        resume_offset: int = 0,
        tenant: str = "",
        generated_tokens: int = 0,
        stream_interval_ms: int = 0,
        **sampling: Any,
    ) -> Stream:
        """Submits a request; returns at once."""
        service_class = (
            types_pb2.SERVICE_CLASS_BEST_EFFORT
            if best_effort
            else types_pb2.SERVICE_CLASS_LATENCY_SENSITIVE
        )
        request = worker_pb2.WorkerServiceGenerateRequest(
            request_id=request_id or uuid.uuid4().hex,
            prompt_token_ids=prompt,
            service_class=service_class,
            sampling=types_pb2.SamplingParams(max_tokens=max_tokens, **sampling),
            slo=types_pb2.Slo(ttft_ms=10_000, tpot_ms=1000),
            resume_offset=resume_offset,
            tenant=tenant,
            generated_tokens=generated_tokens,
            stream_interval_ms=stream_interval_ms,
        )
        stub = worker_pb2_grpc.WorkerServiceStub(channel) if channel else self.stub
        return Stream(stub.Generate(request), request.request_id)

    def start_all(
        self, prompts: Iterable[Sequence[int]], max_tokens: int = 64, **options: Any
    ) -> list[Stream]:
        return [self.start(prompt, max_tokens, **options) for prompt in prompts]

    def generate(self, prompt: Sequence[int], max_tokens: int = 64, **options: Any) -> list[int]:
        return self.start(prompt, max_tokens, **options).finish()

    def rest(
        self, stream: Stream, prompt: Sequence[int], max_tokens: int, **options: Any
    ) -> Stream | None:
        """Resumes behind what `stream` has read, to the end; None if the request was gone by then.

        It is, if this process stands for longer than the worker needs for the rest.
        """
        options |= {"request_id": stream.request_id, "resume_offset": len(stream.tokens)}
        rest = self.start(prompt, max_tokens, **options)
        try:
            rest.finish()
        except grpc.RpcError as error:
            if isinstance(from_rpc_error(error), RequestNotFoundError):
                return None
            raise
        return rest

    def cancel(self, stream: Stream) -> bool:
        """Whether the worker still ran it."""
        request = worker_pb2.WorkerServiceCancelRequest(request_id=stream.request_id)
        return bool(self.stub.Cancel(request).cancelled)

    def status(self) -> status_pb2.WorkerStatus:
        """Figures taken after the call: published ones are up to a tenth of a second old."""
        asked_ns = time.monotonic_ns()

        def newer() -> status_pb2.WorkerStatus | None:
            request = worker_pb2.GetWorkerStatusRequest()
            status = self.stub.GetWorkerStatus(request).status
            return status if status.telemetry.taken_monotonic_ns >= asked_ns else None

        return wait_for("newer figures", newer)

    def telemetry(self) -> status_pb2.Telemetry:
        return self.status().telemetry

    def wait_until(self, what: str, holds: Callable[[status_pb2.WorkerStatus], bool]) -> None:
        wait_for(what, lambda: holds(self.status()))

    def wait_until_idle(self) -> None:
        """Nothing is held: the engine has looked its pools over, and all processes live."""
        self.wait_until("everything given back", _is_idle)
        wait_for("health", self.is_serving)

    def signal_servers(self, number: signal.Signals) -> None:
        for server in self.servers:
            send(server.process, number)

    def engine_pid(self) -> int:
        return next(pid for pid, command in self.worker.children.items() if "spawn_main" in command)

    def _show_logs(self) -> None:
        for service in self.services:
            print(service.tail, file=sys.stderr)

    def _start(self, module: str, flags: dict[str, Any], name: str) -> Service:
        service = Service(module, flags, self.folder, name)
        self.services.append(service)
        return service


def _is_idle(status: status_pb2.WorkerStatus) -> bool:
    now = status.telemetry
    held = now.device_blocks_total - now.device_blocks_free + now.rows_parked
    waiting = now.ls_running + now.ls_waiting + now.be_waiting
    pages = all(s.pages_free == s.pages_total > 0 for s in status.attention_servers)
    return pages and held + waiting == 0


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"
