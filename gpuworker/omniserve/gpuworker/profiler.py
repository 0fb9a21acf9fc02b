"""Measures a worker's stages once at start and fits the latency model's data."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.device.port import Device
from omniserve.gpuworker.requests import Request
from omniserve.latency import LatencyProfile

# Where the device pads stages to counts of its own, those instead.
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Few passes sample more rows than this; the LM head costs as much as many layers.
_SAMPLED_MAX = 128
# Larger row counts are left out if the smaller ones have taken this long.
_TIME_S = 15.0
_REPEATS = 5
_CONTEXT = 256
# A profile kept from an earlier start is doubted if one of these rows takes less than this part.
_SPOT_ROWS = (1, 8, 64)
_FASTER = 0.8
_DECODE_ROWS = 8


def measure(
    device: Device, hardware: str, model: str, page_tokens: int, pages: int
) -> LatencyProfile:
    """Runs every kind of stage at growing row counts; takes well under 30 s.

    Uses the device KV as scratch space, so it must run before the first request.
    """
    first: list[float] = []
    middle: list[float] = []
    last: list[float] = []
    until = time.monotonic() + _TIME_S
    counts = device.padded_counts or _ROWS
    for rows in counts:
        if time.monotonic() > until:
            break
        stages = _Stages(device, rows)
        repeats = _REPEATS if rows <= 64 else 2
        first.append(_undisturbed_ns(device, stages.first, repeats))
        middle.append(_middle_ns(device, stages) or first[-1])
        if rows <= _SAMPLED_MAX:
            last.append(_undisturbed_ns(device, stages.last, repeats))
        else:
            last.append(last[-1] * rows / counts[len(last) - 1])
    room = pages * page_tokens // _DECODE_ROWS
    context = min(_CONTEXT, room, device.config.context_tokens)
    row_ns, token_ns = _decode_attention(device, context, page_tokens)
    chunk = Cohort([_chunk(0, context, page_tokens)], page_tokens)
    pair_ns = _attention_ns(device, chunk) / (context * context / 2)
    return LatencyProfile(
        hardware=hardware,
        model=model,
        dtype=str(device.dtype).removeprefix("torch."),
        rows=tuple(counts[: len(first)]),
        first_stage_ns=tuple(first),
        middle_stage_ns=tuple(middle),
        last_stage_ns=tuple(last),
        attend_row_ns=row_ns,
        attend_kv_token_ns=token_ns,
        attend_pair_ns=pair_ns,
        padded=bool(device.padded_counts),
    )


def was_disturbed(device: Device, profile: LatencyProfile) -> bool:
    """Whether stages run clearly faster now than `profile` says: its host was busy then.

    Takes some tens of milliseconds. That the host is busier now is for the online correction.
    """
    for rows, known_ns in zip(profile.rows, profile.middle_stage_ns, strict=True):
        if rows in _SPOT_ROWS:
            now_ns = _middle_ns(device, _Stages(device, rows))
            if 0 < now_ns < _FASTER * known_ns:
                return True
    return False


def _middle_ns(device: Device, stages: _Stages) -> float:
    """0 for a model of a single layer.

    Other layers each time: a stage finds its weights in memory, not in a cache. A low percentile:
    other processes only ever add.
    """
    layers = range(device.config.layers - 1)
    samples = [_undisturbed_ns(device, partial(stages.middle, layer), 1) for layer in layers]
    return float(np.percentile(samples, 25)) if samples else 0.0


class _Stages:
    """The dense part of each kind of stage, with `rows` made-up rows.

    They are the same in every stage, as those of a cohort are. Rows that come and go may cost a
    device more: that is the online correction's.
    """

    def __init__(self, device: Device, rows: int) -> None:
        self._device = device
        # Nothing attends: all may be the first token of the first page.
        self._cohorts = [Cohort([_chunk(0, 1, 1) for _ in range(rows)], 1)]
        self._wanted = np.zeros(rows, dtype=np.bool_)
        self.first()

    def first(self) -> None:
        self._run(0)

    def middle(self, layer: int) -> None:
        self._run(layer + 1)

    def last(self) -> None:
        self._device.finish(self._cohorts, None, self._wanted, _nothing)

    def _run(self, stage: int) -> None:
        self._device.run(stage, self._cohorts, None)
        self._device.wait(_nothing)


def _decode_attention(device: Device, context: int, page_tokens: int) -> tuple[float, float]:
    """Returns (ns per decode row, ns per KV token read), of a batch at two context lengths."""
    short, long = min(page_tokens, context), context
    times = {}
    for tokens in (short, long):
        rows = [_chunk(tokens - 1, 1, page_tokens, row) for row in range(_DECODE_ROWS)]
        times[tokens] = _attention_ns(device, Cohort(rows, page_tokens)) / _DECODE_ROWS
    if long == short:
        return times[short], 0.0
    token_ns = max(0.0, (times[long] - times[short]) / (long - short))
    return max(0.0, times[short] - token_ns * short), token_ns


def _chunk(start: int, tokens: int, page_tokens: int, owner: int = 0) -> Chunk:
    """A chunk of a request that owns the `owner`-th lot of device pages."""
    end = start + tokens
    request = Request("profile", False, np.zeros(end, dtype=np.int64), end, 0, known=end)
    pages = -(-end // page_tokens)
    request.blocks = list(range(owner * pages, (owner + 1) * pages))
    return Chunk(request, start, tokens)


def _attention_ns(device: Device, cohort: Cohort) -> float:
    device.run(0, [cohort], None)  # leaves q, k and v
    layers = iter(list(range(device.config.layers)) * _REPEATS)

    def attend() -> None:
        device.attend(next(layers), cohort)
        device.wait(_nothing)

    return _undisturbed_ns(device, attend, 2 * _REPEATS)


def _nothing() -> None:
    """There is nothing to do meanwhile."""


def _undisturbed_ns(device: Device, work: Callable[[], object], repeats: int) -> float:
    """Least of `repeats` times: other processes only ever add."""
    for _ in range(device.untypical_runs):
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - start)
    return float(min(times))
