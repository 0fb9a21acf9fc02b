"""Plain serving: what one worker does without best-effort work, beside the machine's limits.

Starts a worker without attention servers (SmolLM2-135M, bfloat16, two threads) and sends
latency-sensitive requests through its gRPC front: one at a time, and many at once with objectives
that nothing misses, so that only their throughput counts.

    python benchmarks/engine.py --json

The last line is one JSON object: `single.{tpot_ms,ttft_ms}` (medians over requests of 128 in, 128
out), `offline_256_128.tokens_per_s` (64 at once) and `offline_1500_128.tokens_per_s` (24 at once),
output tokens over the time from the first sending to the last token; `limits.{weight_read_ms,
gemm_gflops}` of the same run; and per phase the `cores` that engine, front and client kept busy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import limits
from support.cpu_time import CpuTime
from support.load import NO_HURRY, Arrival, Load, tokens_per_s
from support.worker import PARAMETERS, THREADS, serve
from support.worker_stack import WorkerStack

from omniserve.client.bench.metrics import tpots_ms, ttfts_ms

SINGLE = Arrival(0.0, 128, 128)
OFFLINE = {
    "offline_256_128": [Arrival(0.0, 256, 128)] * 64,
    "offline_1500_128": [Arrival(0.0, 1500, 128)] * 24,
}
PHASES = ("single", *OFFLINE, "limits")
DEVICE_KV_TOKENS = 24 * 1696
"""Every request of a phase is on the device at once."""


def main() -> int:
    options = _options()
    report: dict[str, Any] = {}
    with serve(device_kv_tokens=DEVICE_KV_TOKENS) as stack:
        load = Load(stack.worker.address, NO_HURRY, seed=0)
        load.run([Arrival(0.0, 64, 8)])  # warms up
        for phase in options.phases:
            report[phase] = _measure(phase, stack, load, options.single_requests)
            print(f"{phase}: {report[phase]}", file=sys.stderr, flush=True)
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--phases", nargs="+", choices=PHASES, default=PHASES, help="what to measure (default all)"
    )
    parser.add_argument(
        "--single-requests", type=int, default=12, help="requests of `single` (default 12)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    return parser.parse_args()


def _measure(phase: str, stack: WorkerStack, load: Load, single_requests: int) -> dict[str, Any]:
    if phase == "limits":
        return _limits()
    cpu = CpuTime(stack)
    if phase == "single":
        result = _single(load, single_requests)
    else:
        result = {"tokens_per_s": round(tokens_per_s(load.run(OFFLINE[phase])), 1)}
    return result | {"cores": cpu.cores()}


def _single(load: Load, requests: int) -> dict[str, Any]:
    records = [sent.record for _ in range(requests) for sent in load.run([SINGLE])]
    return {
        "tpot_ms": round(statistics.median(tpots_ms(records)), 3),
        "ttft_ms": round(statistics.median(ttfts_ms(records)), 2),
        "requests": requests,
    }


def _limits() -> dict[str, Any]:
    """While the worker idles."""
    read_bytes_per_s = limits.read_bytes_per_s(THREADS)
    return {
        "weight_read_ms": round(2 * PARAMETERS / read_bytes_per_s * 1e3, 3),
        "gemm_gflops": round(limits.gemm_flops(THREADS) / 1e9, 1),
        "read_gbs": round(read_bytes_per_s / 1e9, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
