"""Predicts what a pass costs (OmniServe's f_D and f_A): a staircase in rows, linear in KV read.

Fitted by a short profile at the first start, corrected online for each regime. Pure; no torch.
"""

from __future__ import annotations

import enum
import math
import operator
from typing import NamedTuple

import numpy as np

from omniserve.latency import LatencyProfile

# How fast a factor follows once it has seen a few iterations, and how far one of them may pull
# it: an outlier (a descheduled process) must not look like a slower machine, a slower machine
# must not look like one outlier after another.
_GAIN = 0.05
_OUTLIER = 1.5
# Row counts 2^n .. 2^(n + 1) - 1 share a factor; the last one is that of all larger counts.
_SIZES = 12


class Regime(enum.IntEnum):
    """What an iteration consists of. An error of the model in one says nothing of the others."""

    LS_DECODE = 0
    LS_PREFILL = 1
    """LS rows, a prompt's among them, perhaps with boarded rows."""
    BOARDING = 2
    """LS decode rows and boarded rows."""
    BE_COHORT = 3
    """LS rows and best-effort rows that attend on the device, perhaps with boarded rows."""
    BE_PASS = 4
    """Best-effort rows that attend on the device, without LS."""
    BE_STAGE = 5
    """One stage of parked rows, perhaps with best-effort decode rows of the device; no LS."""
    BE_FIRST_STAGE = 6
    """The same at stage 0, which has little work of its own, and ..."""
    BE_LAST_STAGE = 7
    """... at the last one, which samples."""


class Load(NamedTuple):
    """Work of a set of fixed rows, additive. A tuple, for a decision makes dozens of them."""

    rows: int = 0
    decode_rows: int = 0
    sampled: int = 0
    decode_kv_tokens: int = 0
    prefill_kv_pairs: int = 0

    def __add__(self, other: Load) -> Load:  # type: ignore[override]
        return Load(
            self.rows + other.rows,
            self.decode_rows + other.decode_rows,
            self.sampled + other.sampled,
            self.decode_kv_tokens + other.decode_kv_tokens,
            self.prefill_kv_pairs + other.prefill_kv_pairs,
        )

    def __sub__(self, other: Load) -> Load:
        return Load(*map(operator.sub, self, other))

    @staticmethod
    def decode(context_tokens: int) -> Load:
        """One decode row whose sequence has `context_tokens`, itself included."""
        return Load(1, 1, 1, context_tokens, 0)

    @staticmethod
    def prefill(start: int, tokens: int, *, last: bool) -> Load:
        """A chunk of `tokens` behind `start` tokens of context; one token attends as decode."""
        if tokens == 1:
            return Load(1, 1, int(last), start + 1, 0)
        return Load(tokens, 0, int(last), 0, tokens * (2 * start + tokens) // 2)


class Staircase:
    """Time of a stage against rows, as a list over every row count up to the largest measured.

    Between measured counts it is interpolated; where rows are `padded` to these, it is that of the
    next one, and boarding what a bucket has left is free. It never falls: what was measured lower
    with more rows was measured on a quieter host.
    """

    def __init__(self, rows: tuple[int, ...], times_ns: tuple[float, ...], padded: bool) -> None:
        steps = np.maximum.accumulate(np.asarray(times_ns, dtype=np.float64))
        counts = np.arange(rows[-1] + 1)
        of_counts = steps[np.searchsorted(rows, counts)]
        if not padded:
            of_counts = np.interp(counts, rows, steps)
        self._ns: list[float] = of_counts.tolist()
        self._ns[0] = 0.0
        self._last = rows[-1]

    def __getitem__(self, rows: int) -> float:
        if rows > self._last:  # beyond the profile cost grows with rows
            return self._ns[-1] * rows / self._last
        return self._ns[rows]

    def most_rows(self, budget_ns: float, rows: int, limit: int) -> int:
        """Largest n <= limit for which n rows beside `rows` add at most `budget_ns`."""
        if budget_ns < 0:
            return 0
        most_ns = self[rows] + budget_ns
        if self[rows + limit] <= most_ns:
            return limit
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            if self[rows + middle] <= most_ns:
                low = middle
            else:
                high = middle
        return low


class LatencyModel:
    """Cost of stages and passes, in ns, as a function of their load.

    `pass_ns` and `stage_ns` are what the profile says; times `factor` they are the prediction.
    """

    def __init__(self, profile: LatencyProfile, layers: int) -> None:
        self.profile = profile
        self.layers = layers
        self.first = Staircase(profile.rows, profile.first_stage_ns, profile.padded)
        self.middle = Staircase(profile.rows, profile.middle_stage_ns, profile.padded)
        self.last = Staircase(profile.rows, profile.last_stage_ns, profile.padded)
        self._factors = [[1.0] * _SIZES for _ in Regime]
        self._seen = [[0] * _SIZES for _ in Regime]

    def pass_ns(self, load: Load) -> float:
        """A whole pass with `load` in it, uncorrected."""
        rows = load.rows
        if rows == 0:
            return 0.0
        return (
            self.first[rows]
            + (self.layers - 1) * self.middle[rows]
            + self.last[load.sampled]
            + self.layers * self.attention_ns(load)
        )

    def attention_ns(self, load: Load) -> float:
        """The device attention of one layer."""
        profile = self.profile
        return (
            load.decode_rows * profile.attend_row_ns
            + load.decode_kv_tokens * profile.attend_kv_token_ns
            + load.prefill_kv_pairs * profile.attend_pair_ns
        )

    def stage_ns(self, stage: int, rows: int) -> float:
        """The dense part of one stage, uncorrected."""
        return self.staircase(stage)[rows]

    def rows_for_rate(self, rows: int, part: float) -> int:
        """Fewest rows that reach `part` of the rows per second of a stage of its own with `rows`.

        As corrected: what a stage costs besides its dense work weighs more the fewer they are.
        """
        low, high = 0, rows
        rate = part * rows / self._own_stage_ns(rows)
        while high - low > 1:
            middle = (low + high) // 2
            if middle >= rate * self._own_stage_ns(middle):
                high = middle
            else:
                low = middle
        return high

    def reaches_rate(self, some: int, rows: int, part: float) -> bool:
        """Whether `some` rows are enough for what `rows_for_rate` is about."""
        if some == 0:
            return False
        return some / self._own_stage_ns(some) >= part * rows / self._own_stage_ns(rows)

    def _own_stage_ns(self, rows: int) -> float:
        # Between the factors of the two nearest sizes: a step from one to the other would look
        # like the price of a row.
        factors = self._factors[Regime.BE_STAGE]
        at = min(max(math.log2(rows) + 0.5, 1.0), _SIZES - 1.0)  # where sizes have their centres
        size = min(int(at), _SIZES - 2)
        factor = factors[size] + (factors[size + 1] - factors[size]) * (at - size)
        return self.middle[rows] * factor

    def be_stage_regime(self, stage: int) -> Regime:
        """Of one stage of parked rows."""
        if stage == 0:
            return Regime.BE_FIRST_STAGE
        return Regime.BE_LAST_STAGE if stage == self.layers else Regime.BE_STAGE

    def staircase(self, stage: int) -> Staircase:
        if stage == 0:
            return self.first
        return self.last if stage == self.layers else self.middle

    def factor(self, regime: Regime, rows: int) -> float:
        """By how much iterations of this kind, with `rows` fixed rows, exceed the profile."""
        return self._factors[regime][_size(rows)]

    def observe(self, regime: Regime, rows: int, predicted_ns: float, measured_ns: float) -> None:
        """Corrects the factor that `predicted_ns` was made with by how long it took instead."""
        if predicted_ns <= 0 or measured_ns <= 0:
            return
        size = _size(rows)
        factors, seen = self._factors[regime], self._seen[regime]
        gain = max(_GAIN, 0.5 / (seen[size] + 1))
        ratio = min(max(measured_ns / predicted_ns, 1 / _OUTLIER), _OUTLIER)
        factors[size] *= 1 + gain * (ratio - 1)
        seen[size] += 1
        if seen[size] == 1:
            # Sizes not met yet are likely off as their nearest neighbour is.
            met = [s for s in range(_SIZES) if seen[s]]
            for other in range(_SIZES):
                factors[other] = factors[_nearest(met, other)]


def _nearest(sizes: list[int], size: int) -> int:
    """Returns `size` itself if it is among `sizes`."""
    return min(sizes, key=lambda met: abs(met - size))


def _size(rows: int) -> int:
    return min(rows.bit_length(), _SIZES - 1)
