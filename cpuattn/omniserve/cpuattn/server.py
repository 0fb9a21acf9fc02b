"""One attention server process: claims its arena, starts the hot loop, serves until SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from omniserve.attnkernel import kernel_name, use_kernel
from omniserve.attnkernel._core import ServerLoop
from omniserve.cpuattn.arena import Arena
from omniserve.cpuattn.service import AttentionService
from omniserve.cpuattn.settings import CpuAttnSettings
from omniserve.cpuattn.topology import Cores, choose_cores
from omniserve.errors import SettingsError
from omniserve.internal.v1 import attention_pb2, attention_pb2_grpc
from omniserve.rpc import SERVER_OPTIONS, add_reflection, bind

_log = logging.getLogger(__name__)

SERVICE = attention_pb2.DESCRIPTOR.services_by_name["AttentionService"].full_name
# The loop's counter grows ten times a second; three periods without growth are a hang.
HEALTH_PERIOD_S = 1.0
GRACE_S = 2.0


def serve(settings: CpuAttnSettings) -> None:
    """Runs until SIGTERM or SIGINT. Raises typed errors of the start."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if settings.kernel != "auto":
        try:
            use_kernel(settings.kernel)
        except ValueError as error:
            raise SettingsError(f"kernel: {error}", field="kernel") from error
    cores = choose_cores(settings)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4), options=SERVER_OPTIONS)
    # The port first: it is the cheapest thing to find taken.
    port = bind(server, settings.listen)
    with cores.here():
        arena = Arena(settings.arena_path, settings.arena_bytes)
    loop = _start_loop(settings, cores)
    _say(settings, cores, arena, loop, port)
    service = AttentionService(settings, loop)
    attention_pb2_grpc.add_AttentionServiceServicer_to_server(service, server)
    health_servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    add_reflection(server, [SERVICE])
    _publish(health_servicer, alive=True)
    server.start()
    _watch(loop, health_servicer, stop)
    health_servicer.enter_graceful_shutdown()
    service.drain()
    server.stop(GRACE_S).wait()
    arena.remove()


def _start_loop(settings: CpuAttnSettings, cores: Cores) -> ServerLoop:
    exclusive = settings.cores == "exclusive"
    return ServerLoop(
        str(settings.arena_path),
        threads=settings.threads,
        spin_us=settings.spin_us if exclusive else 0,
        background=settings.background and not exclusive,
        cpus=cores.pinned,
        fault_delay_us=settings.fault_delay_ms * 1000,
        fault_seed=settings.fault_seed,
    )


def _watch(loop: ServerLoop, servicer: health.HealthServicer, stop: threading.Event) -> None:
    """Keeps health equal to the loop's progress until `stop`."""
    seen = loop.progress
    still_periods = 0
    while not stop.wait(HEALTH_PERIOD_S):
        still_periods = still_periods + 1 if loop.progress == seen else 0
        seen = loop.progress
        _publish(servicer, alive=still_periods < 3)


def _publish(servicer: health.HealthServicer, *, alive: bool) -> None:
    response = health_pb2.HealthCheckResponse
    status = response.SERVING if alive else response.NOT_SERVING
    for name in ("", SERVICE):
        servicer.set(name, status)


def _placed(settings: CpuAttnSettings, cores: Cores, loop: ServerLoop) -> str:
    if cores.pinned:
        return f"{settings.cores} cores, pinned"
    if not settings.background:
        return f"{settings.cores} cores"
    refused = f" (at nice 19 instead: {loop.not_in_background})" if loop.not_in_background else ""
    return f"{settings.cores} cores, in the background{refused}"


def _say(
    settings: CpuAttnSettings, cores: Cores, arena: Arena, loop: ServerLoop, port: int
) -> None:
    locked = f"not locked: {loop.not_locked}" if loop.not_locked else "locked"
    facts = [
        f"{settings.server_id} listening on {settings.listen} (port {port})",
        f"{settings.threads} attention thread(s), {_placed(settings, cores, loop)}, "
        f"{kernel_name()} kernel",
        cores.map,
        f"arena {arena.path}, {arena.size_bytes} bytes, allocated, "
        f"{arena.huge_bytes} of them in huge pages, {locked}",
        f"started empty: {loop.not_adopted}"
        if loop.not_adopted
        else f"adopted segment {loop.segment_id} of worker {loop.worker_id}",
    ]
    for fact in facts:
        _log.info("%s", fact)
