"""Predicted and measured times of the last iterations: how good the latency model is.

A ring of fixed size in the engine's memory; the loop only writes numbers into it. The file is
written when the engine stops, one JSON object a line, oldest first.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from omniserve.gpuworker.latency_model import Regime
from omniserve.gpuworker.plan import Plan

_ITERATIONS = 1 << 16
_FIELDS = np.dtype(
    [
        ("decided_ns", np.int64),
        ("decision_ns", np.int64),
        ("regime", np.int8),
        ("rows", np.int32),
        ("stages", np.int16),
        ("predicted_ns", np.float64),
        ("measured_ns", np.int64),
        ("cut_short", np.bool_),
    ]
)


class IterationLog:
    """The last iterations. Owned by the engine's loop."""

    def __init__(self, path: str) -> None:
        """`path` is where `write` puts it; with "" nothing is kept."""
        self._path = path
        self._ring = np.zeros(_ITERATIONS if path else 0, dtype=_FIELDS)
        self._count = 0

    def begin(self, plan: Plan, decided_ns: int, decision_ns: int) -> None:
        """Records what `plan` is predicted to take, before it runs.

        `decided_ns` is when, on the engine's clock; `decision_ns` is how long the decisions on
        moves and plan took.
        """
        if self._path:
            self._ring[self._count % _ITERATIONS] = (
                decided_ns,
                decision_ns,
                plan.regime,
                plan.rows,
                len(plan.stages),
                plan.predicted_ns,
                0,
                False,
            )

    def end(self, measured_ns: int, cut_short: bool) -> None:
        """Adds how long it took; `cut_short` if BE left on the way, so that it was another plan."""
        if self._path:
            entry = self._ring[self._count % _ITERATIONS]
            entry["measured_ns"], entry["cut_short"] = measured_ns, cut_short
            self._count += 1

    def write(self) -> None:
        """Writes the file, if one is wanted."""
        if not self._path:
            return
        oldest = max(0, self._count - _ITERATIONS)
        with Path(self._path).open("w") as file:
            for number in range(oldest, self._count):
                entry = self._ring[number % _ITERATIONS]
                values = {name: entry[name].item() for name in _FIELDS.names or ()}
                values["regime"] = Regime(values["regime"]).name.lower()
                file.write(json.dumps(values) + "\n")
