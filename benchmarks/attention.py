"""Decode attention of the native kernel against what this machine can read and multiply.

For each geometry, context, batch and number of threads it alternates calls of the kernel (over
512 MiB of distinct KV, so that no cache serves it), read loops over as much memory, and
`scaled_dot_product_attention` on contiguous KV of the same shape.

    python benchmarks/attention.py --json

`fraction` is KV bytes read per second over `limit_gbs`: the best read loop of the same run, or what
the bfloat16 peak lets through if that is less. A fraction over 1.02 fails the run: then the loops
are too weak. `int8_speedup` is tokens per second with int8 KV over bfloat16. Every ratio is the
median of those of single rounds, for a host may give half as much memory bandwidth from one second
to the next; the best loop is found before, and reads right before and after the kernel. The faster
of the two reads is the limit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812

from omniserve.attnkernel import kernel_names
from omniserve.attnkernel._bench import (
    AttentionProbe,
    ReadProbe,
    bf16_flops,
    kernel_name,
    use_kernel,
)

Result = TypeVar("Result")

GEOMETRIES = ((9, 3, 64), (32, 8, 128), (64, 8, 128), (32, 32, 128))
CONTEXTS = (1024, 4096, 16384)
BATCHES = (1, 8, 32)
PAGE_TOKENS = 64
# Far more than a cache holds: of 128 MiB a large one still serves a good part.
DISTINCT_BYTES = 512 << 20
# Of KV that a side reads in a round, unless one call reads more.
CALLS_BYTES = 256 << 20
# Below this many tokens a call is so short that starting it counts.
LONG_TOKENS = 8192
TOO_FAST = 1.02
# torch's threads spin for several ms after their work: too short a pause halves who comes next.
SETTLE_S = 0.03
# Then its own threads wake, which takes as long as dozens of the shortest calls.
WARM_S = 0.005


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    context: int
    batch: int

    @property
    def kv_bytes(self) -> int:
        """K and V in bfloat16."""
        return 4 * self.batch * self.context * self.kv_heads * self.dim

    @property
    def sets(self) -> int:
        """So many calls go by before one reads the same KV again."""
        return -(-DISTINCT_BYTES // self.kv_bytes)

    def probe(self, kv_dtype: str, threads: int, *, fragmented: bool = False) -> AttentionProbe:
        return AttentionProbe(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            kv_dtype=kv_dtype,
            page_tokens=PAGE_TOKENS,
            context=self.context,
            rows=1,
            batch=self.batch,
            sets=self.sets,
            threads=threads,
            fragmented=fragmented,
        )


class Sdpa:
    """torch's attention over contiguous KV; calls rotate over distinct KV as well.

    The heads of a group are rows of one head's query, which torch is fastest with.
    """

    def __init__(self, shape: Shape) -> None:
        kv = (shape.batch, shape.kv_heads, shape.context, shape.dim)
        sets = shape.sets
        self._k = [torch.zeros(kv, dtype=torch.bfloat16) for _ in range(sets)]
        self._v = [torch.zeros(kv, dtype=torch.bfloat16) for _ in range(sets)]
        group = shape.heads // shape.kv_heads
        self._q = torch.randn(shape.batch, shape.kv_heads, group, shape.dim).bfloat16()
        self._set = 0

    def run(self) -> float:
        self._set = (self._set + 1) % len(self._k)
        k, v = self._k[self._set], self._v[self._set]
        start = time.perf_counter()
        F.scaled_dot_product_attention(self._q, k, v)
        return time.perf_counter() - start


def settled(run: Callable[[], Result]) -> Callable[[], Result]:
    """Waits until the threads of the side before are asleep, and makes calls that do not count."""

    def call() -> Result:
        time.sleep(SETTLE_S)
        warm_ns = time.perf_counter_ns() + WARM_S * 1e9
        run()
        while time.perf_counter_ns() < warm_ns:
            run()
        return run()

    return call


def repeated(run: Callable[[], float], calls: int) -> Callable[[], float]:
    first = settled(run)
    return lambda: statistics.median([first(), *(run() for _ in range(calls - 1))])


def best_loop(reader: ReadProbe) -> int:
    """The read loop that is fastest now; hosts change."""
    sweeps = zip(*(reader.sweep() for _ in range(3)), strict=True)
    rates = [statistics.median(loop) for loop in sweeps]
    return rates.index(max(rates))


def measure(
    shape: Shape, threads: int, reader: ReadProbe, flops: float, rounds: int
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    int8 = shape.heads <= 4 * shape.kv_heads
    calls = max(1, min(40, CALLS_BYTES // shape.kv_bytes))
    loop = best_loop(reader)
    read = settled(lambda: reader.read(loop))
    sides = {
        "read": read,
        "bfloat16": repeated(shape.probe("bfloat16", threads).run, calls),
        "read_again": read,
        "sdpa": settled(Sdpa(shape).run),
    }
    if int8:
        sides["int8"] = repeated(shape.probe("int8", threads).run, calls)
    sides["fragmented"] = repeated(shape.probe("bfloat16", threads, fragmented=True).run, calls)
    results: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, run in sides.items():
                results[name].append(run())
    group = shape.heads // shape.kv_heads
    # Each KV element takes part in two operations of every query head of its group.
    peak = flops / group if group >= 8 and flops else math.inf
    limits = [
        min(peak, max(reads)) for reads in zip(results["read"], results["read_again"], strict=True)
    ]

    def ratio(above: Iterable[float], below: Iterable[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    def fraction(name: str) -> float:
        return ratio((shape.kv_bytes / seconds for seconds in results[name]), limits)

    return {
        "geometry": f"{shape.heads}/{shape.kv_heads}/{shape.dim}",
        "context": shape.context,
        "batch": shape.batch,
        "threads": threads,
        "kv_gbs": round(shape.kv_bytes / statistics.median(results["bfloat16"]) / 1e9, 2),
        "limit_gbs": round(statistics.median(limits) / 1e9, 2),
        "fraction": round(fraction("bfloat16"), 3),
        "fragmented_fraction": round(fraction("fragmented"), 3),
        "sdpa_speedup": round(ratio(results["sdpa"], results["bfloat16"]), 2),
        "int8_speedup": round(ratio(results["bfloat16"], results["int8"]), 2) if int8 else None,
    }


def main() -> int:
    options = _options()
    if options.kernel:
        use_kernel(options.kernel)
    cores = len(os.sched_getaffinity(0))
    cases = []
    for threads in sorted({1, cores}):
        reader = ReadProbe(DISTINCT_BYTES, threads)
        flops = max(bf16_flops(threads) for _ in range(9))
        for geometry, context, batch in itertools.product(GEOMETRIES, CONTEXTS, BATCHES):
            shape = Shape(*geometry, context, batch)
            if 3 * shape.kv_bytes > options.memory_gib << 30:
                print(f"skipped: {shape} needs more than --memory-gib", file=sys.stderr)
                continue
            case = measure(shape, threads, reader, flops, options.rounds)
            cases.append(case)
            print(json.dumps(case), file=sys.stderr, flush=True)
    all_threads = [case for case in cases if case["threads"] == cores]
    long = [c["fraction"] for c in all_threads if c["batch"] * c["context"] >= LONG_TOKENS]
    speedups = [c["int8_speedup"] for c in all_threads if c["int8_speedup"]]
    report = {
        "kernel": kernel_name(),
        "cases": cases,
        "min_fraction_all_threads": min(c["fraction"] for c in all_threads),
        "min_fraction_long_all_threads": min(long),
        "median_fraction_all_threads": statistics.median(c["fraction"] for c in all_threads),
        "median_sdpa_speedup": statistics.median(c["sdpa_speedup"] for c in all_threads),
        "int8_speedup": statistics.median(speedups),
    }
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    weak = [c for c in cases if c["fraction"] > TOO_FAST]
    if weak:
        print(f"the read loops are too weak: {weak}", file=sys.stderr)
    return 1 if weak else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="of each side (default 15)")
    parser.add_argument(
        "--memory-gib", type=int, default=16, help="leave out cases that need more (default 16)"
    )
    parser.add_argument("--kernel", choices=kernel_names(), help="(default: the fastest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
