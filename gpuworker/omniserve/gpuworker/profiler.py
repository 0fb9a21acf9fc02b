"""Measures a worker's stages once at start and fits the latency model's data."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.device.cpu import CpuDevice
from omniserve.gpuworker.device.rows import CohortRows
from omniserve.gpuworker.requests import Request
from omniserve.latency import LatencyProfile

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_REPEATS = 5
_CONTEXT = 256


def measure(device: CpuDevice, model: str, page_tokens: int, pages: int) -> LatencyProfile:
    """Runs every kind of stage at growing row counts; takes a few seconds.

    Uses the device KV as scratch space, so it must run before the first request.
    """
    layers = device.config.layers
    first: list[float] = []
    middle: list[float] = []
    last: list[float] = []
    for rows in _ROWS:
        stages = _Stages(device, rows)
        repeats = _REPEATS if rows <= 64 else 2
        first.append(_undisturbed_ns(stages.first, repeats))
        # Other layers each time: a stage finds its weights in memory, not in a cache. A low
        # percentile: other processes only ever add.
        samples = [_undisturbed_ns(partial(stages.middle, layer), 1) for layer in range(layers - 1)]
        middle.append(float(np.percentile(samples, 25)))
        last.append(_undisturbed_ns(stages.last, repeats) if rows <= 64 else last[-1] * 2)
    context = min(_CONTEXT, pages * page_tokens // 2)
    row_ns, token_ns = _decode_attention(device, context, page_tokens)
    chunk = Cohort([_chunk(0, context, page_tokens)], page_tokens)
    pair_ns = _attention_ns(device, chunk) / (context * context / 2)
    return LatencyProfile(
        hardware=platform.processor() or platform.machine(),
        model=model,
        dtype=str(device.dtype).removeprefix("torch."),
        rows=_ROWS,
        first_stage_ns=tuple(first),
        middle_stage_ns=tuple(middle),
        last_stage_ns=tuple(last),
        attend_row_ns=row_ns,
        attend_kv_token_ns=token_ns,
        attend_pair_ns=pair_ns,
    )


class _Stages:
    """The dense part of each kind of stage, with `rows` made-up rows."""

    def __init__(self, device: CpuDevice, rows: int) -> None:
        self._device = device
        self._rows = rows
        at = np.arange(rows) % device.config.context_tokens
        held = CohortRows(
            device.config, device.dtype, np.zeros(rows, np.int64), at, np.arange(rows)
        )
        held.attention[:] = 0
        self._all, self._sampled = [held.all], [held.sampled]
        self.first()

    def first(self) -> None:
        self._device.run(0, self._all)

    def middle(self, layer: int) -> None:
        self._device.run(layer + 1, self._all)

    def last(self) -> None:
        self._device.logits(self._sampled, self._rows)


def _decode_attention(device: CpuDevice, context: int, page_tokens: int) -> tuple[float, float]:
    """Returns (ns per decode row, ns per KV token read), from two context lengths."""
    short, long = page_tokens, context
    times = {}
    for tokens in (short, long):
        cohort = Cohort([_chunk(tokens - 1, 1, page_tokens)], page_tokens)
        times[tokens] = _attention_ns(device, cohort)
    if long == short:
        return times[short], 0.0
    token_ns = max(0.0, (times[long] - times[short]) / (long - short))
    return max(0.0, times[short] - token_ns * short), token_ns


def _chunk(start: int, tokens: int, page_tokens: int) -> Chunk:
    end = start + tokens
    request = Request("profile", False, np.zeros(end, dtype=np.int64), end, 0, known=end)
    request.blocks = list(range(-(-end // page_tokens)))
    return Chunk(request, start, tokens)


def _attention_ns(device: CpuDevice, cohort: Cohort) -> float:
    rows = device.enter(cohort)
    rows.qkv[:] = 0
    layers = iter(list(range(device.config.layers)) * _REPEATS)
    return _undisturbed_ns(lambda: device.attend(next(layers), cohort, rows), 2 * _REPEATS)


def _undisturbed_ns(work: Callable[[], object], repeats: int) -> float:
    """Least of `repeats` times: other processes only ever add."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - start)
    return float(min(times))
