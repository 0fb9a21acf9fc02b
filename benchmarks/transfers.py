"""CHECKPOINT and RESTORE as an attention server carries them out, against memcpy of the same rows.

    python benchmarks/transfers.py --json

Both sides alternate, with all threads, over slots and places that no cache holds. The last line is
one JSON object: `cases[].{geometry,kv_dtype,checkpoint_gbs,restore_gbs,checkpoint_fraction,
restore_fraction}` (bytes of K and V rows; fractions are memcpy's time over ours) and
`min_fraction` over the cases whose KV has the rows' dtype, `min_fraction_int8` over the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from typing import Any

from omniserve.attnkernel import Geometry
from omniserve.attnkernel._bench import TransferProbe

LAYERS = 4
TOKENS = 256
# Of K and V rows, and of slots: far more than caches hold.
DISTINCT_BYTES = 256 << 20
CASES = [(*shape, kv) for kv in ("bfloat16", "int8") for shape in ((9, 3, 64), (32, 8, 128))]


def main() -> int:
    options = _options()
    cases = [_measure(case, options.rounds, options.threads) for case in CASES]
    report = {
        "threads": options.threads,
        "cases": cases,
        "min_fraction": _least_fraction(cases, "bfloat16"),
        "min_fraction_int8": _least_fraction(cases, "int8"),
    }
    if options.json:
        print(json.dumps(report))
    else:
        for case in cases:
            print(case)
        print("min_fraction", report["min_fraction"], "int8", report["min_fraction_int8"])
    return 0


def _least_fraction(cases: list[dict[str, Any]], kv_dtype: str) -> float:
    return float(
        min(
            min(case["checkpoint_fraction"], case["restore_fraction"])
            for case in cases
            if case["kv_dtype"] == kv_dtype
        )
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="of each kind (default 100)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="default: all cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    return parser.parse_args()


def _measure(case: tuple[int, int, int, str], rounds: int, threads: int) -> dict[str, Any]:
    heads, kv_heads, head_dim, kv_dtype = case
    round_bytes = LAYERS * TOKENS * 2 * kv_heads * head_dim * 2
    sets = -(-DISTINCT_BYTES // round_bytes)
    page_tokens = 32
    geometry = Geometry(
        layers=LAYERS,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype="bfloat16",
        kv_dtype=kv_dtype,
        page_tokens=page_tokens,
        max_sequences=sets,
        max_sequence_tokens=TOKENS,
        # A slot has room for several tokens.
        slots=-(-sets * TOKENS * LAYERS * 2 * kv_heads // (2 * (heads + kv_heads)))
        + TOKENS * LAYERS,
        pages=2 * sets * TOKENS // page_tokens,  # room for memcpy's side in int8 too
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="omniserve-bench-") as folder:
        probe = TransferProbe(folder, geometry, threads)
        times: dict[str, list[float]] = {"checkpoint": [], "restore": [], "in": [], "out": []}
        for _ in range(rounds + sets):
            times["checkpoint"].append(probe.checkpoint())
            times["restore"].append(probe.restore())
            times["in"].append(probe.copy(to_arena=True))
            times["out"].append(probe.copy(to_arena=False))
        size = probe.bytes
        del probe
    # The first sweep touches memory for the first time.
    measured = {name: values[sets:] for name, values in times.items()}

    def gbs(name: str) -> float:
        return round(size / statistics.median(measured[name]) / 1e9, 2)

    def fraction(name: str, copy: str) -> float:
        pairs = zip(measured[copy], measured[name], strict=True)
        return round(statistics.median(c / t for c, t in pairs), 3)

    return {
        "geometry": f"{heads}/{kv_heads}/{head_dim}",
        "kv_dtype": kv_dtype,
        "checkpoint_gbs": gbs("checkpoint"),
        "restore_gbs": gbs("restore"),
        "memcpy_in_gbs": gbs("in"),
        "memcpy_out_gbs": gbs("out"),
        "checkpoint_fraction": fraction("checkpoint", "in"),
        "restore_fraction": fraction("restore", "out"),
    }


if __name__ == "__main__":
    sys.exit(main())
