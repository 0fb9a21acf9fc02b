"""Measures a worker's stages once at start and fits the latency model's data."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.device.cpu import CpuDevice
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
        tokens = torch.zeros(rows, dtype=torch.int64)
        positions = torch.arange(rows) % device.config.context_tokens
        residual = torch.randn(rows, device.config.hidden).to(device.dtype)
        attention = torch.randn(rows, device.config.q_size).to(device.dtype)
        repeats = _REPEATS if rows <= 64 else 2

        def run_first(tokens: torch.Tensor = tokens, at: torch.Tensor = positions) -> None:
            device.enter_layer(0, device.embed(tokens), at)

        def run_middle(
            layer: int,
            x: torch.Tensor = residual,
            a: torch.Tensor = attention,
            at: torch.Tensor = positions,
        ) -> None:
            device.enter_layer(layer + 1, device.leave_layer(layer, x, a), at)

        def run_last(x: torch.Tensor = residual, a: torch.Tensor = attention) -> None:
            device.logits(device.leave_layer(layers - 1, x, a))

        first.append(_undisturbed_ns(run_first, repeats))
        # Other layers each time: a stage finds its weights in memory, not in a cache. A low
        # percentile: other processes only ever add.
        samples = [_undisturbed_ns(partial(run_middle, layer), 1) for layer in range(layers - 1)]
        middle.append(float(np.percentile(samples, 25)))
        last.append(_undisturbed_ns(run_last, repeats) if rows <= 64 else last[-1] * 2)
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
    config = device.config
    qkv = torch.randn(cohort.rows, config.q_size + 2 * config.kv_size).to(device.dtype)
    out = torch.empty(cohort.rows, config.q_size, dtype=device.dtype)
    layers = iter(list(range(config.layers)) * _REPEATS)
    return _undisturbed_ns(lambda: device.attend(next(layers), qkv, cohort, out), 2 * _REPEATS)


def _undisturbed_ns(work: Callable[[], object], repeats: int) -> float:
    """Least of `repeats` times: other processes only ever add."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - start)
    return float(min(times))
