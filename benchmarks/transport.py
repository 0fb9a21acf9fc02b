"""What a message between a worker and an attention server costs, apart from attention.

Two processes on two cores, on one segment: this one is the worker's end (`WorkerLink`), the other
answers as a server's executor does, without attention. Rounds of all kinds alternate, so that
drift of the host meets all of them alike.

    python benchmarks/transport.py --json

The last line is one JSON object: `spin_us`, `sleep_us` and `bare_futex_us` (round trips of an empty
message to a spinning server and to a sleeping one, and of a futex word that is all there is, with
`p50` and `p99` each), `sleep_over_futex` (of the medians), and `payloads` (per number of `rows`:
`ring_us`, `memcpy_us`, and `fraction_of_memcpy`, memcpy's time over the ring's).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omniserve.attnkernel import Geometry
from omniserve.attnkernel._bench import TransportPair

ROWS = (1, 64, 400)
EMPTY_MESSAGES = 50_000
SLEEPS = 500
ROWS_PER_ROUND = 8_000


def main() -> int:
    options = _options()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("transport: SETTINGS: two cores are needed", file=sys.stderr)
        return 2
    # 64/8/128 in bfloat16: 36 KiB of q, k, v and out in a row.
    geometry = Geometry(
        layers=1,
        heads=64,
        kv_heads=8,
        head_dim=128,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        page_tokens=16,
        max_sequences=1,
        max_sequence_tokens=16,
        slots=max(ROWS),
        pages=1,
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="omniserve-bench-") as folder:
        pair = TransportPair(folder, geometry, cores[1])
        os.sched_setaffinity(0, {cores[0]})
        report = _measure(pair, options.rounds)
        del pair
    if options.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:17} {value}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="of each kind (default 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    return parser.parse_args()


def _measure(pair: TransportPair, rounds: int) -> dict[str, Any]:
    times: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
    for number in range(rounds + 1):
        results = _round(pair)
        if number:  # the first one warms up
            for name, ns in results.items():
                times[name].append(ns)
    report: dict[str, Any] = {name: _percentiles(times[name]) for name in _EMPTY}
    report["sleep_over_futex"] = round(
        report["sleep_us"]["p50"] / report["bare_futex_us"]["p50"], 3
    )
    report["payloads"] = [_payload(times, rows) for rows in ROWS]
    report["rounds"] = rounds
    return report


_EMPTY = ("spin_us", "sleep_us", "bare_futex_us")


def _round(pair: TransportPair) -> dict[str, NDArray[np.int64]]:
    results = {
        "spin_us": pair.empty_messages(EMPTY_MESSAGES, False),
        "sleep_us": pair.empty_messages(SLEEPS, True),
        "bare_futex_us": pair.bare_futex(SLEEPS),
    }
    for rows in ROWS:
        repeats = ROWS_PER_ROUND // rows
        # The first of each finds the caches as the other kind left them.
        results[f"ring{rows}"] = pair.ring_rows(repeats, rows)[1:]
        results[f"memcpy{rows}"] = pair.memcpy_rows(repeats, rows)[1:]
    return results


def _percentiles(rounds: list[NDArray[np.int64]]) -> dict[str, float]:
    """Medians over rounds, in us."""
    return {
        name: round(statistics.median(float(np.percentile(ns, q)) for ns in rounds) / 1e3, 3)
        for name, q in (("p50", 50), ("p99", 99))
    }


def _payload(times: dict[str, list[NDArray[np.int64]]], rows: int) -> dict[str, float]:
    ring, memcpy = (
        [float(np.median(ns)) / 1e3 for ns in times[f"{kind}{rows}"]] for kind in ("ring", "memcpy")
    )
    return {
        "rows": rows,
        "ring_us": round(statistics.median(ring), 3),
        "memcpy_us": round(statistics.median(memcpy), 3),
        "fraction_of_memcpy": round(
            statistics.median(m / r for m, r in zip(memcpy, ring, strict=True)), 3
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
