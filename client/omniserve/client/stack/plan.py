"""Which processes make the stack, and with which command lines. Pure but for free ports."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from omniserve.client.stack import host
from omniserve.client.stack.process import ProcessSpec, probe_grpc, probe_redis
from omniserve.client.stack.settings import StackSettings


@dataclass(frozen=True)
class StackPlan:
    """Processes in tiers: a tier starts when the one before is healthy, and stops before it."""

    tiers: tuple[tuple[ProcessSpec, ...], ...]
    """All processes."""
    address: str
    """ "host:port" of the control plane."""


def plan_stack(settings: StackSettings, shm_dir: Path) -> StackPlan:
    """Raises the typed errors of `host` if the machine lacks something."""
    model_path = host.model_file(settings.model_path)
    port = settings.port
    if port:
        host.check_port_free(settings.host, port)
    redis_port, worker_port, free_port, *server_ports = host.free_ports(
        3 + settings.attention_servers
    )
    port = port or free_port
    redis_url = settings.redis_url or f"redis://127.0.0.1:{redis_port}/0"
    servers = [_server(settings, i, p, shm_dir) for i, p in enumerate(server_ports)]
    worker = _worker(settings, worker_port, servers, model_path, shm_dir, redis_url)
    control = _control_plane(settings, port, model_path, redis_url)
    store = () if settings.redis_url else (_valkey(redis_port, shm_dir),)
    return StackPlan(
        tiers=((*store, *servers), (worker, control)),
        address=control.address,
    )


def _valkey(port: int, data_dir: Path) -> ProcessSpec:
    # Its data lives as long as the stack; who wants to keep jobs longer gives a redis_url.
    options = {
        "--port": str(port),
        "--bind": "127.0.0.1",
        "--dir": str(data_dir),
        "--appendonly": "yes",  # an acknowledged job survives a crash of Valkey
        "--save": "",
    }
    return ProcessSpec(
        name="valkey",
        command=(str(host.valkey_binary()), *(part for pair in options.items() for part in pair)),
        address=f"127.0.0.1:{port}",
        probe=probe_redis,
        restart=False,
    )


def _server(settings: StackSettings, index: int, port: int, shm_dir: Path) -> ProcessSpec:
    address = f"127.0.0.1:{port}"
    return _service(
        f"cpuattn-a{index}",
        "omniserve.cpuattn",
        address,
        {
            "--server-id": f"a{index}",
            "--listen": address,
            "--shm-dir": str(shm_dir),
            "--arena-bytes": str(settings.arena_bytes),
            "--threads": str(settings.attention_threads),
            "--cores": settings.cores,
        },
        restart=True,
    )


def _worker(
    settings: StackSettings,
    port: int,
    servers: list[ProcessSpec],
    model_path: Path,
    shm_dir: Path,
    redis_url: str,
) -> ProcessSpec:
    address = f"127.0.0.1:{port}"
    return _service(
        "gpuworker-w0",
        "omniserve.gpuworker",
        address,
        {
            "--worker-id": "w0",
            "--listen": address,
            "--attention-servers": ",".join(s.address for s in servers),
            "--model": settings.model,
            "--model-path": str(model_path),
            "--dtype": settings.dtype,
            "--device": settings.device,
            "--shm-dir": str(shm_dir),
            "--device-kv-tokens": str(settings.device_kv_tokens),
            "--threads": str(settings.worker_threads),
            "--redis-url": redis_url,
        },
        restart=False,
    )


def _control_plane(
    settings: StackSettings, port: int, model_path: Path, redis_url: str
) -> ProcessSpec:
    address = f"{settings.host}:{port}"
    return _service(
        "controlplane",
        "omniserve.controlplane",
        address,
        {
            "--listen": address,
            "--redis-url": redis_url,
            "--model": settings.model,
            "--model-path": str(model_path),
            "--slo-ttft-ms": str(settings.slo_ttft_ms),
            "--slo-tpot-ms": str(settings.slo_tpot_ms),
        },
        restart=True,
    )


def _service(
    name: str, module: str, address: str, options: dict[str, str], *, restart: bool
) -> ProcessSpec:
    flat = (part for pair in options.items() for part in pair)
    return ProcessSpec(
        name=name,
        command=(sys.executable, "-m", module, *flat),
        address=address,
        probe=probe_grpc,
        restart=restart,
    )
