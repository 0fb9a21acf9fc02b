"""Settings of one GPU worker; its environment is OMNISERVE_WORKER_*."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from omniserve.settings import ServiceSettings


def _default_cache_dir() -> Path:
    """Follows the XDG base directories."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "omniserve"


class WorkerSettings(ServiceSettings):
    """Everything that a worker can be told at start. Frozen; unknown keys fail."""

    model_config = SettingsConfigDict(
        env_prefix="OMNISERVE_WORKER_", cli_prog_name="python -m omniserve.gpuworker"
    )

    worker_id: str = Field(
        "w0", description="Name of this worker, unique among those of one Redis."
    )
    listen: str = Field("127.0.0.1:8501", description="Address of the gRPC front.")
    advertise: str = Field(
        "",
        description="Address, host:port, at which control planes reach the front, if it is not "
        "the one that it listens on, such as 0.0.0.0:8501.",
    )
    attention_servers: str = Field(
        "", description="Comma-separated gRPC addresses of the attention servers on this host."
    )
    redis_url: str = Field("", description="Where heartbeats go, none if empty; rediss:// for TLS.")
    redis_password_file: Path | None = Field(
        None, description="File whose first line is the password of Redis."
    )
    redis_ca_file: Path | None = Field(
        None,
        description="PEM file with the certificates to trust in rediss://; the system's without "
        "one.",
    )
    shm_dir: Path = Field(Path("/dev/shm"), description="Folder on tmpfs shared with the servers.")

    model: str = Field("SmolLM2-135M-Instruct", description="Name under which the model is served.")
    model_path: Path = Field(
        Path("model.gguf"), description="GGUF file, or Hugging Face folder with safetensors."
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto",
        description="dummy: random weights for the shape in the folder's config.json, to measure "
        "a model that is not at hand.",
    )
    context_tokens_max: int = Field(
        0,
        ge=0,
        description="Serve no longer requests than this, of models with contexts that memory has "
        "no room for; 0 is the model's own context.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Of weights, activations and KV; float16 with device cuda only."
    )
    kv_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="Of KV at the attention servers: auto is `dtype`; int8 has a scale per token "
        "and head, and nearly halves the bytes.",
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="Device back end. No GPU has run `cuda` yet: it is there to be tried."
    )
    threads: int = Field(2, ge=1, description="Threads of the cpu back end.")
    kernel: str = Field(
        "auto",
        description="Instruction set of the cpu back end's kernels, such as x86-64-v3: auto is the "
        "best that this CPU has; a name that it does not have is refused with those that it has.",
    )

    page_tokens: int = Field(
        64,
        description="Tokens of one KV page: 16, 32, 48 or 64. Attention reads large ones faster.",
    )
    device_kv_tokens: int = Field(16384, ge=64, description="Size of the device KV, in tokens.")
    be_sequences_max: int = Field(
        256, ge=1, description="BE sequences that one attention server may hold."
    )
    transfer_slots: int = Field(
        2048,
        ge=64,
        description="Slots per server for checkpoints and restores: a few tokens of a layer each.",
    )
    prefix_cache: bool = Field(
        True,
        description="Whether requests of one tenant share the KV of equal beginnings of their "
        "prompts and chats.",
    )
    prefill_chunk_tokens_max: int = Field(
        512, ge=16, description="Prompt tokens in one pass, at most."
    )
    policy: Literal["omniserve", "ls-first", "reserve", "sync-offload", "preempt", "ls-only"] = (
        Field("omniserve", description="Who decides what runs; see docs/architecture.md.")
    )
    reserve_headroom: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Of the policy `reserve`: part of KV and rows that is kept for LS.",
    )
    latency_cache_dir: Path = Field(
        default_factory=_default_cache_dir,
        description="Folder in which measured latency profiles are kept.",
    )
    iteration_log: str = Field(
        "",
        description="File for the predicted and measured time of the last iterations, as JSON "
        "lines, written when the worker stops; none if empty.",
    )
    be_placement: Literal["auto", "device", "host"] = Field(
        "auto",
        description="Where BE requests decode: `auto` fills the device share and sends the rest "
        "to the servers; the others force one path (tests, comparisons).",
    )
    be_stream_interval_s: float = Field(
        1.0,
        ge=0,
        description="Tokens of a BE request are sent about this often, unless it says how often "
        "itself, as jobs do: a message costs CPU time in each process that it passes.",
    )
    fault_moves_per_pass: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Test switch: chance, per BE request and iteration, of a "
        "forced demotion or promotion.",
    )
    fault_seed: int = Field(0, description="Seed of the test switch.")
    orphan_lease_s: float = Field(
        10.0, ge=0, description="How long a request goes on after its stream broke."
    )
    drain_s: float = Field(
        5.0,
        ge=0,
        description="How long running LS requests may go on after SIGTERM; BE is handed back.",
    )

    @property
    def parked_rows(self) -> int:
        """Rows that the parking lot has room for, at least one."""
        return max(1, self.be_sequences_max * len(self.attention_server_addresses))

    @property
    def attention_server_addresses(self) -> list[str]:
        return [a for a in self.attention_servers.split(",") if a]
