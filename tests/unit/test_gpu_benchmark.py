"""`benchmarks/gpu_stages.py` on a simulated GPU: its figures mean nothing there, but they come."""

from __future__ import annotations

import sys
from pathlib import Path

from support.simulated_gpu import SimulatedGpu

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_stages


def test_every_kind_of_pass_and_copy_is_measured() -> None:
    shape = gpu_stages.SHAPES["tiny"]
    report = gpu_stages.measure(SimulatedGpu(1), shape, 64, [1, 2], [0, 2], rounds=1)
    assert [row["batch"] for row in report["ls"]] == [1, 2]
    assert [row["rows"] for row in report["boarded"]] == [0, 2]
    figures = [*report["ls"], *report["boarded"], report["transfers"], report["limits"]]
    assert all(value > 0 for row in figures for key, value in row.items() if key != "rows")
