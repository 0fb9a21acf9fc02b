"""Runs a GPU worker: `python -m omniserve.gpuworker --help`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from omniserve import logs
from omniserve.attnkernel import Bell
from omniserve.errors import NoWorkerError, OmniServeError
from omniserve.gpuworker import engine_process
from omniserve.gpuworker.attachments import Attachments
from omniserve.gpuworker.channel import FrontChannel
from omniserve.gpuworker.front import WorkerFront
from omniserve.gpuworker.heartbeat import Heartbeat
from omniserve.gpuworker.settings import WorkerSettings
from omniserve.internal.v1 import attention_pb2, engine_pb2, worker_pb2, worker_pb2_grpc
from omniserve.rpc import SERVER_OPTIONS, add_reflection, bind, exit_on_error
from omniserve.v1 import status_pb2

_log = logging.getLogger("omniserve.gpuworker")
_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
# The engine looks its pools over as it ends; then its memory goes, page by page.
_ENGINE_END_S = 20.0
# The engine reports ten times a second, if no pass takes longer, and a pass is a matter of
# seconds on the slowest host: silence this long means that it makes no progress.
_PROGRESS_NS = 10 * 10**9


class Worker:
    """The front process: starts the engine, the gRPC server and the background tasks."""

    def __init__(
        self, settings: WorkerSettings, engine: Callable[..., None] = engine_process.run
    ) -> None:
        """engine: what the engine's process runs."""
        self._settings = settings
        self._epoch = secrets.randbits(63)
        self._bell_path = str(settings.shm_dir / f"{settings.worker_id}.bell")
        front_end, self._engine_end = socket.socketpair()
        self._channel = FrontChannel(front_end, Bell(self._bell_path, create=True))
        self._attachments: Attachments | None = None
        self._front = WorkerFront(settings, self._channel, self._server_stats)
        self._heartbeat = Heartbeat(settings) if settings.redis_url else None
        self._health = health.aio.HealthServicer()
        context = multiprocessing.get_context("spawn")
        self._engine = context.Process(
            target=engine,
            args=(settings, self._engine_end, self._bell_path),
            name="omniserve-engine",
        )

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, or until the engine dies. Raises typed errors."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self._front, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        add_reflection(server, [_SERVICE])
        bind(server, self._settings.listen)
        await self._say(serving=False)
        await self._channel.open(self._front.apply)
        self._engine.start()
        self._engine_end.close()
        tasks: list[asyncio.Task[None]] = []
        try:
            await server.start()
            await self._until_ready(stop)
            if not stop.is_set():
                tasks += [asyncio.ensure_future(work) for work in self._background(stop)]
                await stop.wait()
                await self._say(serving=False)
                if self._engine.is_alive():
                    await self._front.drain(self._settings.drain_s)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._front.release()
            await server.stop(grace=1.0)
            await self._stop_engine()
            Path(self._bell_path).unlink(missing_ok=True)
        if self._engine.exitcode:
            raise OmniServeError(f"the engine ended with status {self._engine.exitcode}")

    async def _until_ready(self, stop: asyncio.Event) -> None:
        ready = asyncio.ensure_future(self._front.ready())
        while not ready.done() and not stop.is_set():
            alive = self._engine.is_alive()
            await asyncio.wait([ready], timeout=0.2)  # what a dead one said arrives by then
            if not alive and not ready.done():
                raise OmniServeError(f"the engine ended with status {self._engine.exitcode}")
        if not ready.done():
            ready.cancel()
            return
        request = attention_pb2.AttachRequest(
            worker_id=self._settings.worker_id,
            epoch=self._epoch,
            geometry=ready.result().geometry,
            layers=ready.result().layers,
            bell_path=self._bell_path,
        )
        addresses = self._settings.attention_server_addresses
        self._attachments = Attachments(addresses, request, self._channel.send)
        _log.info("engine ready: %s on %s", self._settings.model, self._settings.device)

    def _background(self, stop: asyncio.Event) -> Iterator[Coroutine[Any, Any, None]]:
        assert self._attachments is not None
        yield self._attachments.run()
        yield self._watch_engine(stop)
        if self._heartbeat is not None:
            yield self._heartbeat.run(self._report)

    async def _watch_engine(self, stop: asyncio.Event) -> None:
        """Keeps health up to date; the engine's death ends the worker."""
        while not stop.is_set():
            if not self._engine.is_alive():
                _log.error("the engine ended with status %s", self._engine.exitcode)
                stop.set()
                return
            await self._say(serving=self._able())
            await asyncio.sleep(0.1)

    def _able(self) -> bool:
        """Whether each server has been attached once, and the engine made progress lately."""
        still_ns = time.monotonic_ns() - self._front.telemetry.taken_monotonic_ns
        attached = self._attachments is not None and self._attachments.complete
        return attached and still_ns < _PROGRESS_NS

    async def _report(self) -> worker_pb2.GetWorkerStatusResponse | None:
        """What to tell Redis: nothing if a request sent here now would only wait."""
        return await self._front.status() if self._able() else None

    async def _say(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        value = status.SERVING if serving else status.NOT_SERVING
        for service in ("", _SERVICE):
            await self._health.set(service, value)

    async def _stop_engine(self) -> None:
        with contextlib.suppress(NoWorkerError):
            self._channel.send(engine_pb2.EngineCommand(shutdown=engine_pb2.Shutdown()))
        await asyncio.to_thread(self._engine.join, _ENGINE_END_S)
        if self._engine.is_alive():
            self._engine.kill()
            await asyncio.to_thread(self._engine.join)
        self._channel.close()

    def _server_stats(self) -> list[status_pb2.AttentionServerStatus]:
        return self._attachments.stats if self._attachments is not None else []


async def _serve(settings: WorkerSettings, engine: Callable[..., None]) -> None:
    await Worker(settings, engine).run()


def main(engine: Callable[..., None] = engine_process.run) -> None:
    with exit_on_error("omniserve-gpuworker"):
        settings = WorkerSettings.load(sys.argv[1:])
        logs.configure("gpuworker", settings.log_level, settings.log_format)
        asyncio.run(_serve(settings, engine))


if __name__ == "__main__":
    main()
