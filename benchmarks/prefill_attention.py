"""Attention of a chunk of a prompt against the matrix peak and against torch.

The chunk's rows see the context before them, in pages, and one another causally. Both sides
alternate in one run, with all threads.

    python benchmarks/prefill_attention.py --json

`fraction_of_peak` is floating-point operations per second (of scores and sums that the causal mask
leaves) over the best rate of a large bfloat16 `torch.mm` in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from omniserve.attnkernel import kernel_name
from omniserve.attnkernel._bench import AttentionProbe

GEOMETRIES = ((9, 3, 64), (32, 8, 128))
CHUNKS = (256, 1024)
CONTEXTS = (0, 1024, 8192)
MATRIX = 2048
# torch's threads spin for several ms after their work: too short a pause halves who comes next.
SETTLE_S = 0.03


def sdpa(heads: int, kv_heads: int, dim: int, chunk: int, context: int) -> Callable[[], float]:
    """torch's attention over contiguous KV, with the mask of a chunk behind a context.

    K and V are repeated for the heads of a group beforehand: torch is slower with `enable_gqa`.
    """
    group = heads // kv_heads
    q = torch.randn(1, heads, chunk, dim).bfloat16()
    k, v = (
        torch.randn(1, kv_heads, context + chunk, dim).bfloat16().repeat_interleave(group, 1)
        for _ in range(2)
    )
    mask = torch.ones(chunk, context + chunk, dtype=torch.bool).tril(context) if context else None

    def run() -> float:
        start = time.perf_counter()
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return time.perf_counter() - start

    return run


def matrix() -> Callable[[], float]:
    a = torch.randn(MATRIX, MATRIX).bfloat16()
    b = torch.randn(MATRIX, MATRIX).bfloat16()

    def run() -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        return 2 * MATRIX**3 / (time.perf_counter() - start)

    return run


def measure(
    geometry: tuple[int, int, int], chunk: int, context: int, threads: int, rounds: int
) -> dict[str, Any]:
    heads, kv_heads, dim = geometry
    ours = AttentionProbe(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        kv_dtype="bfloat16",
        page_tokens=64,
        context=context,
        rows=chunk,
        batch=1,
        sets=4,
        threads=threads,
    )
    sides: dict[str, Callable[[], float]] = {
        "ours": ours.run,
        "sdpa": sdpa(*geometry, chunk, context),
        "peak": matrix(),
    }
    took: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, run in sides.items():
                time.sleep(SETTLE_S)  # lets the threads of the side before fall asleep
                run()
                took[name] += [run() for _ in range(3)]
    seconds = statistics.median(took["ours"])
    seen = chunk * context + chunk * (chunk + 1) // 2
    rate = 4 * heads * dim * seen / seconds
    return {
        "geometry": "/".join(map(str, geometry)),
        "chunk": chunk,
        "context": context,
        "gflops": round(rate / 1e9, 1),
        "fraction_of_peak": round(rate / statistics.median(took["peak"]), 3),
        "sdpa_speedup": round(statistics.median(took["sdpa"]) / seconds, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each side (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    cases = []
    for geometry, chunk, context in itertools.product(GEOMETRIES, CHUNKS, CONTEXTS):
        cases.append(measure(geometry, chunk, context, threads, options.rounds))
        print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    report = {
        "kernel": kernel_name(),
        "threads": threads,
        "cases": cases,
        "median_fraction_of_peak": statistics.median(c["fraction_of_peak"] for c in cases),
        "median_sdpa_speedup": statistics.median(c["sdpa_speedup"] for c in cases),
    }
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
