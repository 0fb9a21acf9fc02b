"""Settings of one attention server; its environment is OMNISERVE_CPUATTN_*."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from omniserve.settings import ServiceSettings


class CpuAttnSettings(ServiceSettings):
    """Everything that an attention server can be told at start. Frozen; unknown keys fail."""

    model_config = SettingsConfigDict(
        env_prefix="OMNISERVE_CPUATTN_", cli_prog_name="omniserve-cpuattn"
    )

    server_id: str = Field(
        "a0", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Name of this server on its host."
    )
    listen: str = Field("127.0.0.1:8601", description="Address of the gRPC control server.")
    shm_dir: Path = Field(Path("/dev/shm"), description="Folder on tmpfs shared with the worker.")
    arena_bytes: int = Field(
        1 << 30,
        ge=1 << 16,
        description="Size of the segment: KV and bookkeeping. `omniserve.shm.layout.arena_bytes` "
        "computes it from a geometry and a number of pages.",
    )
    threads: int = Field(1, ge=1, le=256, description="Threads that compute attention.")
    cores: Literal["shared", "exclusive"] = Field(
        "shared",
        description="shared: no spinning, and see --background. exclusive: one pinned core per "
        "thread, all on one NUMA node, that no other server of the host has; spins before it "
        "sleeps.",
    )
    kernel: str = Field(
        "auto",
        description="Instruction set of the kernel, such as x86-64-v3: auto is the best that this "
        "CPU has; a name that it does not have is refused with those that it has.",
    )
    background: bool = Field(
        True,
        description="On shared cores, attention runs only where nothing else on the host wants to "
        "(SCHED_IDLE). Without, it competes with the worker for them.",
    )
    spin_us: int = Field(
        50, ge=0, description="How long threads on exclusive cores spin before they sleep, in us."
    )
    drain_ms: int = Field(
        5000, ge=0, description="How long Drain and SIGTERM wait for the rings to empty, in ms."
    )
    fault_delay_ms: int = Field(
        0, ge=0, description="Test switch: holds each answer a random time up to this, in ms."
    )
    fault_seed: int = Field(0, ge=0, description="Seed of --fault-delay-ms.")

    @property
    def arena_path(self) -> Path:
        return self.shm_dir / f"{self.server_id}.arena"
