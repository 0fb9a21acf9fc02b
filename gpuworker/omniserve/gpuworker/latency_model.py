"""Predicts what a pass costs (OmniServe's f_D and f_A): a staircase in rows, linear in KV read.

Fitted by a short profile at start, corrected online by one factor. Pure; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omniserve.latency import LatencyProfile

# How fast the online factor follows, and how far one observation may pull it: an outlier (a
# descheduled process) must not look like a slower machine, a slower machine must not look like
# one outlier after another.
_CORRECTION_GAIN = 0.05
_OUTLIER = 2.0


@dataclass(frozen=True)
class Load:
    """Work of a set of fixed rows, additive."""

    rows: int = 0
    decode_rows: int = 0
    sampled: int = 0
    decode_kv_tokens: int = 0
    prefill_kv_pairs: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.rows + other.rows,
            self.decode_rows + other.decode_rows,
            self.sampled + other.sampled,
            self.decode_kv_tokens + other.decode_kv_tokens,
            self.prefill_kv_pairs + other.prefill_kv_pairs,
        )

    @staticmethod
    def decode(context_tokens: int) -> Load:
        """One decode row whose sequence has `context_tokens`, itself included."""
        return Load(1, 1, 1, context_tokens, 0)

    @staticmethod
    def prefill(start: int, tokens: int, *, last: bool) -> Load:
        """A chunk of `tokens` behind `start` tokens of context."""
        return Load(tokens, 0, int(last), 0, tokens * (2 * start + tokens) // 2)


class LatencyModel:
    """Cost of stages and passes, in ns, as a function of their load."""

    def __init__(self, profile: LatencyProfile, layers: int) -> None:
        self.profile = profile
        self.correction = 1.0
        self._layers = layers
        self._rows = np.asarray(profile.rows, dtype=np.float64)
        self._first = np.asarray(profile.first_stage_ns)
        self._middle = np.asarray(profile.middle_stage_ns)
        self._last = np.asarray(profile.last_stage_ns)

    def pass_ns(self, load: Load, boarded_rows: int = 0) -> float:
        """A whole pass with `load` in it and `boarded_rows` boarding each stage."""
        if load.rows + boarded_rows == 0:
            return 0.0
        dense = (
            self._at(self._first, load.rows + boarded_rows)
            + self._at(self._middle, load.rows + boarded_rows) * (self._layers - 1)
            + self._at(self._last, load.sampled + boarded_rows)
        )
        profile = self.profile
        attention = self._layers * (
            load.decode_rows * profile.attend_row_ns
            + load.decode_kv_tokens * profile.attend_kv_token_ns
            + load.prefill_kv_pairs * profile.attend_pair_ns
        )
        return self.correction * (dense + attention)

    def stage_ns(self, stage: int, rows: int) -> float:
        """The dense part of one stage."""
        times = self._middle
        if stage == 0:
            times = self._first
        elif stage == self._layers:
            times = self._last
        return self.correction * self._at(times, rows)

    def observe(self, predicted_ns: float, measured_ns: float) -> None:
        """Corrects the model by one plan that was predicted and measured."""
        if predicted_ns <= 0 or measured_ns <= 0:
            return
        ratio = min(max(measured_ns / predicted_ns, 1 / _OUTLIER), _OUTLIER)
        self.correction *= 1 + _CORRECTION_GAIN * (ratio - 1)

    def _at(self, times: npt.NDArray[np.float64], rows: int) -> float:
        if rows == 0:
            return 0.0
        last = self._rows[-1]
        if rows > last:  # beyond the profile cost grows with rows
            return float(times[-1] * rows / last)
        return float(np.interp(rows, self._rows, times))
