"""Dense kernels of the cpu back end against what this machine can read and multiply.

For each matrix of SmolLM2-135M and of a layer of Llama-3-8B, and each number of rows, it alternates
the native bfloat16 kernel, `torch.nn.functional.linear` and read loops. Weights are in memory, not
in a cache: each call takes the next of many copies.

    python benchmarks/dense.py --json

`fraction` is the least possible time over the kernel's: that of reading the weights at the best
read loop's rate, or of the arithmetic at the bfloat16 peak, whichever is longer. `decode_pass_ms`
is all stages of SmolLM2 for one row with 128 tokens of context, without scheduling and sampling,
beside `weight_read_ms`, the time that reading its weights takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from support.stack import MODEL_PATH

from omniserve.attnkernel import kernel_name
from omniserve.attnkernel._bench import GemmProbe, ReadProbe, bf16_flops
from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.device.afterwards import Afterwards
from omniserve.gpuworker.device.cpu import CpuDevice
from omniserve.gpuworker.model.gguf_file import GgufModel
from omniserve.gpuworker.model.weights import load_weights
from omniserve.gpuworker.parking import ParkingLot
from omniserve.gpuworker.requests import Request
from omniserve.gpuworker.stages import StageRunner

ROWS = (1, 4, 16, 32, 64, 256, 1024)
READ_BYTES = 512 << 20
# What a cache keeps of weights that come around again must be little.
COPIES_BYTES = 256 << 20
# A case takes about as long whatever its size, so that the host's drift meets all alike.
CASE_S = 0.06
# torch's threads spin for several ms after their work: too short a pause halves who comes next.
SETTLE_S = 0.03
PAGE_TOKENS = 32
CONTEXT_TOKENS = 128


@dataclass(frozen=True)
class Gemm:
    model: str
    matrix: str
    outputs: int
    inputs: int

    @property
    def weight_bytes(self) -> int:
        return 2 * self.outputs * self.inputs

    @property
    def copies(self) -> int:
        return -(-COPIES_BYTES // self.weight_bytes)


GEMMS = (
    Gemm("SmolLM2-135M", "qkv", 960, 576),
    Gemm("SmolLM2-135M", "attention_out", 576, 576),
    Gemm("SmolLM2-135M", "gate_up", 3072, 576),
    Gemm("SmolLM2-135M", "down", 576, 1536),
    Gemm("SmolLM2-135M", "head", 49152, 576),
    Gemm("Llama-3-8B", "qkv", 6144, 4096),
    Gemm("Llama-3-8B", "attention_out", 4096, 4096),
    Gemm("Llama-3-8B", "gate_up", 28672, 4096),
    Gemm("Llama-3-8B", "down", 4096, 14336),
)


class Linear:
    """torch's product with the same copies of a matrix, in turn."""

    def __init__(self, gemm: Gemm) -> None:
        shape = (gemm.outputs, gemm.inputs)
        self._weights = [torch.ones(shape, dtype=torch.bfloat16) for _ in range(gemm.copies)]
        self._next = 0

    def run(self, x: torch.Tensor) -> float:
        weight = self._weights[self._next]
        self._next = (self._next + 1) % len(self._weights)
        start = time.perf_counter()
        F.linear(x, weight)
        return time.perf_counter() - start


def measure(
    gemm: Gemm, threads: int, reader: ReadProbe, flops: float, rounds: int
) -> list[dict[str, Any]]:
    probe = GemmProbe(outputs=gemm.outputs, inputs=gemm.inputs, copies=gemm.copies, threads=threads)
    linear = Linear(gemm)
    cases = []
    for rows in ROWS:
        x = torch.ones(rows, gemm.inputs, dtype=torch.bfloat16)
        native: list[float] = []
        torch_s: list[float] = []
        reads: list[list[float]] = []
        for _ in range(rounds):
            # The pause lets the threads of the side before fall asleep.
            time.sleep(SETTLE_S)
            calls = max(1, min(20, int(CASE_S / rounds / probe.run(rows))))
            native += [probe.run(rows) for _ in range(calls)]
            time.sleep(SETTLE_S)
            linear.run(x)
            torch_s += [linear.run(x) for _ in range(max(1, calls // 2))]
            time.sleep(SETTLE_S)
            reads.append(reader.sweep())
        read = max(statistics.median(rates) for rates in zip(*reads, strict=True))
        took = statistics.median(native)
        work = 2.0 * rows * gemm.outputs * gemm.inputs
        least = max(gemm.weight_bytes / read, work / flops if flops else 0.0)
        cases.append(
            asdict(gemm)
            | {
                "rows": rows,
                "us": round(took * 1e6, 1),
                "weights_gbs": round(gemm.weight_bytes / took / 1e9, 1),
                "read_gbs": round(read / 1e9, 1),
                "gflops": round(work / took / 1e9, 1),
                "fraction": round(least / took, 3),
                "torch_speedup": round(statistics.median(torch_s) / took, 2),
            }
        )
        print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    return cases


def decode_pass(threads: int, reader: ReadProbe, rounds: int) -> dict[str, float]:
    """Times all stages of one LS row on the device."""
    model = GgufModel(MODEL_PATH)
    config = model.config
    pages = -(-CONTEXT_TOKENS // PAGE_TOKENS)
    weights = load_weights(model, torch.bfloat16)
    device = CpuDevice(config, weights, pages, PAGE_TOKENS, threads)
    lot = ParkingLot(1, config.layers + 1, lambda: 0)
    runner = StageRunner(device, lot, [], Afterwards())
    request = Request("r", True, np.zeros(CONTEXT_TOKENS, np.int64), CONTEXT_TOKENS, 0)
    request.known = CONTEXT_TOKENS
    request.blocks = list(range(pages))
    nobody = np.empty(0, np.int64)

    def run() -> float:
        start = time.perf_counter()
        cohort = Cohort([Chunk(request, CONTEXT_TOKENS - 1, 1)], PAGE_TOKENS)
        for stage in range(config.layers + 1):
            runner.run(stage, [cohort], nobody)
        return time.perf_counter() - start

    took: list[float] = []
    reads: list[list[float]] = []
    for _ in range(rounds):
        run()
        took += [run() for _ in range(20)]
        time.sleep(SETTLE_S)
        reads.append(reader.sweep())
    read = max(statistics.median(rates) for rates in zip(*reads, strict=True))
    matrices = sum(
        w.numel() for layer in weights.layers for w in vars(layer).values() if w is not None
    )
    weight_bytes = 2 * (matrices + weights.head.numel())
    return {
        "decode_pass_ms": round(statistics.median(took) * 1e3, 2),
        "weight_read_ms": round(weight_bytes / read * 1e3, 2),
    }


def main() -> int:
    options = _options()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    reader = ReadProbe(READ_BYTES, threads)
    flops = max(bf16_flops(threads) for _ in range(9))
    gemms = [g for g in GEMMS if options.model in ("", g.model)]
    cases: list[dict[str, Any]] = []
    with torch.inference_mode():
        for gemm in gemms:
            cases += measure(gemm, threads, reader, flops, options.rounds)
    report: dict[str, Any] = {
        "kernel": kernel_name(),
        "threads": threads,
        "bf16_gflops": round(flops / 1e9, 1),
        "cases": cases,
        "median_fraction": statistics.median(c["fraction"] for c in cases),
        "median_torch_speedup": statistics.median(c["torch_speedup"] for c in cases),
    } | decode_pass(threads, reader, options.rounds)
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each side (default 5)")
    names = sorted({gemm.model for gemm in GEMMS})
    parser.add_argument("--model", choices=names, default="", help="only its matrices")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
