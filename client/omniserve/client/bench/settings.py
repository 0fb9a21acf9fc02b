"""Settings of the load generator. Names follow `vllm bench serve` where they mean the same."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class BenchSettings(BaseSettings):
    """Each field is a flag of `omniserve bench` and, in capitals, an OMNISERVE_* variable."""

    model_config = SettingsConfigDict(
        env_prefix="OMNISERVE_", frozen=True, extra="forbid", protected_namespaces=()
    )

    duration_s: float = Field(default=60.0, gt=0, description="Length of the measured interval, s.")
    request_rate: float = Field(
        default=0.5, ge=0, description="Chat requests per second; 0 for none."
    )
    burstiness: float = Field(
        default=1.0,
        gt=0,
        description="Shape of the gamma-distributed gaps; 1 is Poisson, less is burstier.",
    )
    max_concurrency: int = Field(
        default=0, ge=0, description="Chat requests in flight; 0 is unbounded."
    )
    ls_max_tokens: int = Field(default=32, ge=1, description="Tokens of a chat answer.")
    slo_ttft_ms: float = Field(
        default=1000.0, gt=0, description="Objective: time to first token, ms."
    )
    slo_tpot_ms: float = Field(
        default=100.0, gt=0, description="Objective: time per output token, ms."
    )
    be_backlog: int = Field(
        default=48, ge=0, description="Best-effort items kept outstanding; 0 for none."
    )
    be_max_tokens: int = Field(default=128, ge=1, description="Tokens of a best-effort answer.")
    num_warmups: int = Field(default=2, ge=0, description="Chat requests before the clock starts.")
    drain_s: float = Field(
        default=10.0, ge=0, description="Wait for chat answers after the interval, s."
    )
    seed: int = Field(default=0, ge=0, description="Of arrivals, texts and sampling.")
    show_answers: int = Field(
        default=3, ge=0, description="Chat answers to stream to the terminal."
    )
    output_dir: str = Field(
        default="runs/bench", description="Folder for report.json and report.png."
    )
