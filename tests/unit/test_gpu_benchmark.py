"""What GPU benchmarks report. On a simulated GPU figures mean nothing, but they come."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from support.simulated_gpu import SimulatedGpu

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_policies
import gpu_stages


def test_every_kind_of_pass_and_copy_is_measured() -> None:
    shape = gpu_stages.SHAPES["tiny"]
    report = gpu_stages.measure(SimulatedGpu(1), shape, 64, [1, 2], [0, 2], rounds=1)
    assert [row["batch"] for row in report["ls"]] == [1, 2]
    assert [row["rows"] for row in report["boarded"]] == [0, 2]
    figures = [*report["ls"], *report["boarded"], report["transfers"], report["limits"]]
    may_be_zero = ("rows", "bubble_ms")
    assert all(value > 0 for row in figures for key, value in row.items() if key not in may_be_zero)


def run_of(policy: str, met: int, be_tokens_per_s: float) -> dict[str, Any]:
    """Of 100 LS requests `met` met their objective."""
    times = {"completed": True, "ttft_ms": 1.0, "tpot_ms": 1.0}
    return {
        "policy": policy,
        "requests": [{"met": index < met} | times for index in range(100)],
        "be_tokens_per_s": be_tokens_per_s,
        "servers_read_bytes_per_s": 90e9,
        "read_bytes_per_s": 100e9,
        "tokens_by_path": {"device_resident": 1},
    }


def test_policies_are_pooled_and_set_against_ours() -> None:
    runs = [run_of("ls-only", 98, 0), run_of("reserve", 98, 100), run_of("preempt", 98, 0)]
    runs += [run_of("omniserve", 96, 400), run_of("omniserve", 98, 600)]
    report = gpu_policies.summary(runs)
    assert [line["ls_requests"] for line in report["policies"]] == [100, 100, 100, 200]
    assert report["omniserve"] == {
        "servers_read_fraction": pytest.approx(0.9),
        "points_below_ls_only": pytest.approx(1.0),
        "be_over_reserve": 5.0,
        "be_over_preempt": None,
    }
