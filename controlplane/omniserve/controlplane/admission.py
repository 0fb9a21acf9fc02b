"""Whether one more LS request fits: pure functions on a worker's telemetry."""

from __future__ import annotations

from dataclasses import dataclass

# A refused caller is told to wait at least this long: the telemetry behind a decision is
# that old, so an earlier retry could only be judged on the same figures.
RETRY_MIN_S = 0.2
# How long a full queue is assumed to take to move on.
RETRY_FULL_S = 1.0


@dataclass(frozen=True)
class Load:
    """LS work of one worker, with what this process sent since that telemetry was taken."""

    ls_requests: int
    """Running and waiting."""
    ls_prefill_tokens_waiting: int
    prefill_token_ms: float
    decode_pass_ms: float
    ls_running_max: int


@dataclass(frozen=True)
class Verdict:
    admitted: bool
    predicted_ttft_ms: float
    reason: str = ""
    retry_after_s: float = 0.0


def predict_ttft_ms(load: Load, prompt_tokens: int) -> float:
    """Time until a newcomer's first token: every prefill ahead of it, its own, and a pass."""
    prefill_tokens = load.ls_prefill_tokens_waiting + prompt_tokens
    return prefill_tokens * load.prefill_token_ms + load.decode_pass_ms


def admit(load: Load, prompt_tokens: int, slo_ttft_ms: float, ls_waiting_max: int) -> Verdict:
    """Admits a request unless it is predicted to miss its TTFT or the worker's queue is full."""
    predicted_ms = predict_ttft_ms(load, prompt_tokens)
    if load.ls_requests >= load.ls_running_max + ls_waiting_max:
        reason = f"{load.ls_requests} requests run or wait at the least loaded worker"
        return Verdict(False, predicted_ms, reason, RETRY_FULL_S)
    if predicted_ms > slo_ttft_ms:
        reason = f"predicted TTFT {predicted_ms:.0f} ms is over the SLO of {slo_ttft_ms:.0f} ms"
        late_s = (predicted_ms - slo_ttft_ms) / 1e3
        return Verdict(False, predicted_ms, reason, max(RETRY_MIN_S, late_s))
    return Verdict(True, predicted_ms)
