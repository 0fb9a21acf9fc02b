"""`benchmarks/gpu_policies.py` on the cpu back end, with a shape of which a test has time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_policies.py"
SMALL = {
    "device": "cpu",
    "shape": "tiny",
    "device-kv-gb": 0.0015,
    "be-context": 512,
    "be-output": 64,
    "sequences": 8,
    "backlog": 2000,
    "settle-s": 2,
    "duration-s": 4,
    "rate": 4,
    "length-scale": 0.1,
    "output-cap": 20,
    "server-threads": 1,
}


@pytest.mark.slow
def test_policies_are_compared_with_a_shape_alone() -> None:
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, SCRIPT, "--json", *flags, "--policies", "ls-only", "omniserve"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads(ended.stdout.splitlines()[-1])
    ls_only, omniserve = report["policies"]
    assert ls_only["ls_requests"] == omniserve["ls_requests"] > 0
    assert ls_only["be_tokens_per_s"] == 0 < omniserve["be_tokens_per_s"]
    assert omniserve["servers_read_gbs"] > 0
    assert "points_below_ls_only" in report["omniserve"]
