"""Settings of one control plane process; its environment is OMNISERVE_CONTROLPLANE_*."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from omniserve.settings import ServiceSettings

PositiveMs = Annotated[float, Field(gt=0, le=3_600_000)]


class Settings(ServiceSettings):
    """Frozen; every time has its unit in its name."""

    model_config = SettingsConfigDict(
        env_prefix="OMNISERVE_CONTROLPLANE_", cli_prog_name="python -m omniserve.controlplane"
    )

    listen: str = "127.0.0.1:8500"
    """Address of the gRPC server, host:port."""
    tls_cert_file: Path | None = None
    """PEM file with the certificate of the server, and its chain; plain text without one."""
    tls_key_file: Path | None = None
    """PEM file with the private key of that certificate."""
    api_key_file: Path | None = None
    """File with the keys that callers may send, one a line; anyone may call without one."""
    redis_url: str = "redis://127.0.0.1:6379"
    """Redis or Valkey that holds all state; rediss:// for TLS."""
    redis_password_file: Path | None = None
    """File whose first line is its password."""
    redis_ca_file: Path | None = None
    """PEM file with the certificates to trust in rediss://; the system's without one."""
    model: str = "SmolLM2-135M-Instruct"
    """Name under which the model is served; workers must report the same."""
    model_path: str = "model.gguf"
    """GGUF file or Hugging Face folder with the tokenizer, chat template and context length."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Least severe events to log, on stderr."""

    slo_ttft_ms: PositiveMs = 1000.0
    """Time to first token that an LS request gets if it names none."""
    slo_tpot_ms: PositiveMs = 100.0
    """Time per output token that an LS request gets if it names none."""
    slo_target: float = Field(0.95, gt=0, le=1)
    """Share of LS requests that shall meet both."""
    slo_window_s: int = Field(30, ge=1, le=300)
    """Attainment is measured over this long."""
    default_max_tokens: int = Field(256, ge=1)
    """Tokens to generate if a request names no number."""

    ls_waiting_max: int = Field(64, ge=0)
    """LS requests that may wait at a worker beyond its running cap."""
    be_generate_max: int = Field(64, ge=1)
    """Best-effort Generate calls in flight in this process."""
    failover_s: float = Field(30.0, ge=0)
    """How long a stream whose worker was lost waits for another one."""

    job_items_max: int = Field(10_000, ge=1)
    """Items of one job."""
    job_queue_items_max: int = Field(100_000, ge=1)
    """Unfinished items of all jobs together."""
    job_window_items: int = Field(64, ge=1)
    """Items that this process has at workers at one time."""
    job_stream_interval_s: float = Field(10.0, ge=0, le=3600)
    """How often workers send an item's tokens; 0 leaves it to them. Nobody reads these before its
    end: they spare a worker work when the one before it is lost. Items with stop strings have the
    workers' interval, as only this process sees a stop string."""
    job_renew_s: float = Field(1.0, gt=0)
    """How often it tells the queue that it still works on them."""
    job_reclaim_s: float = Field(5.0, gt=0)
    """Items not renewed for this long are taken over: their control plane is dead. Within half as
    long again, which should be before workers' `--orphan-lease-s` has them dropped."""
    job_retention_s: int = Field(86_400, ge=1)
    """How long results are kept after a job's end."""

    limits_interval_s: float = Field(0.1, gt=0)
    """Period of the limits loop."""
    drain_s: float = Field(5.0, ge=0)
    """How long running streams may go on after SIGTERM."""
