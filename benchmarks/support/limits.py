"""What this machine can do, measured in the run that is compared with it."""

from __future__ import annotations

import statistics
import time

import torch

from omniserve.attnkernel._bench import ReadProbe

_READ_BYTES = 512 << 20
_MATRIX = 2048
_ROUNDS = 9
_SETTLE_S = 0.003


def read_bytes_per_s(threads: int) -> float:
    """The best read loop's rate over memory that no cache holds."""
    probe = ReadProbe(_READ_BYTES, threads)
    probe.sweep()
    sweeps = [probe.sweep() for _ in range(_ROUNDS)]
    medians: list[float] = [statistics.median(rates) for rates in zip(*sweeps, strict=True)]
    return max(medians)


def gemm_flops(threads: int) -> float:
    """Floating-point operations per second of a large bfloat16 `torch.mm`."""
    torch.set_num_threads(threads)
    a, b = (torch.randn(_MATRIX, _MATRIX).bfloat16() for _ in range(2))
    rates = []
    for _ in range(_ROUNDS):
        time.sleep(_SETTLE_S)
        start = time.perf_counter()
        torch.mm(a, b)
        rates.append(2 * _MATRIX**3 / (time.perf_counter() - start))
    return statistics.median(rates)
