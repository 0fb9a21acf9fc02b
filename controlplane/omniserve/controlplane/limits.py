"""The outer loop's policy: how much best-effort work fits beside LS. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from omniserve.controlplane.slo_state import Window

_Number = TypeVar("_Number", int, float)

# A decision shows in attainment only after the requests it touches have ended, so limits
# move once per this time however often the loop looks.
STEP_S = 1.0
SHRINK = 0.7
GROW_ROWS = 1
GROW_PREFILL_TOKENS = 8
GROW_KV_SHARE = 0.02
MARGIN_UP = 0.05
MARGIN_DOWN = 0.01

ROWS_BOUNDS = (1, 64)
PREFILL_TOKENS_BOUNDS = (8, 256)
KV_SHARE_BOUNDS = (0.1, 0.8)
MARGIN_BOUNDS = (0.1, 0.6)


@dataclass(frozen=True)
class Limits:
    """What the worker's scheduler obeys; fields as in omniserve.v1.Limits."""

    ls_running_max: int = 64
    be_rows_per_stage: int = 16
    be_prefill_tokens_per_iteration: int = 64
    be_device_kv_share: float = 0.5
    safety_margin: float = 0.2


@dataclass(frozen=True)
class State:
    """All that a decision depends on. `window` is the SLO window, `latest` its last seconds."""

    limits: Limits
    changed_s: float
    target: float
    window: Window
    latest: Window


def decide(state: State, now_s: float) -> Limits:
    """Shrinks BE where LS misses its target, else lets it grow; holds between steps.

    Under target, limits shrink only while misses go on: the window remembers old ones for
    its whole length, and shrinking on those would close BE long after the cause has gone.
    Without LS requests nothing shows that more than the starting values is safe.
    """
    if now_s - state.changed_s < STEP_S:
        return state.limits
    if state.window.total == 0:
        return _recovered(state.limits)
    if state.window.attainment >= state.target:
        return _grown(state.limits)
    if state.latest.attainment < state.target:
        return _shrunk(state.limits)
    return state.limits


def _shrunk(limits: Limits) -> Limits:
    return replace(
        limits,
        be_rows_per_stage=_clamp_int(limits.be_rows_per_stage * SHRINK, ROWS_BOUNDS),
        be_prefill_tokens_per_iteration=_clamp_int(
            limits.be_prefill_tokens_per_iteration * SHRINK, PREFILL_TOKENS_BOUNDS
        ),
        be_device_kv_share=_clamp(limits.be_device_kv_share * SHRINK, KV_SHARE_BOUNDS),
        safety_margin=_clamp(limits.safety_margin + MARGIN_UP, MARGIN_BOUNDS),
    )


def _grown(limits: Limits) -> Limits:
    return replace(
        limits,
        be_rows_per_stage=_clamp_int(limits.be_rows_per_stage + GROW_ROWS, ROWS_BOUNDS),
        be_prefill_tokens_per_iteration=_clamp_int(
            limits.be_prefill_tokens_per_iteration + GROW_PREFILL_TOKENS, PREFILL_TOKENS_BOUNDS
        ),
        be_device_kv_share=_clamp(limits.be_device_kv_share + GROW_KV_SHARE, KV_SHARE_BOUNDS),
        safety_margin=_clamp(limits.safety_margin - MARGIN_DOWN, MARGIN_BOUNDS),
    )


def _recovered(limits: Limits) -> Limits:
    """One step of growth, but not beyond the starting values."""
    start, grown = Limits(), _grown(limits)
    return replace(
        limits,
        be_rows_per_stage=_up_to(
            limits.be_rows_per_stage, grown.be_rows_per_stage, start.be_rows_per_stage
        ),
        be_prefill_tokens_per_iteration=_up_to(
            limits.be_prefill_tokens_per_iteration,
            grown.be_prefill_tokens_per_iteration,
            start.be_prefill_tokens_per_iteration,
        ),
        be_device_kv_share=_up_to(
            limits.be_device_kv_share, grown.be_device_kv_share, start.be_device_kv_share
        ),
        safety_margin=-_up_to(-limits.safety_margin, -grown.safety_margin, -start.safety_margin),
    )


def _up_to(value: _Number, grown: _Number, start: _Number) -> _Number:
    return max(value, min(grown, start))


def _clamp(value: float, bounds: tuple[float, float]) -> float:
    return max(bounds[0], min(bounds[1], value))


def _clamp_int(value: float, bounds: tuple[int, int]) -> int:
    return max(bounds[0], min(bounds[1], int(value)))
