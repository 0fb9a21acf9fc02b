"""Passes of the `cuda` back end with random weights, against the memory's speed.

    python benchmarks/gpu_stages.py --shape llama-3-8b --json

`ls`: passes of an LS batch alone, one row a sequence, at several batch sizes; the roofline is the
reading of weights and KV at the copy bandwidth of the same run. `boarded`: passes of an LS batch
with parked rows boarding every stage, whose q, k, v go to a slab on this host and whose attention
comes from there; no server answers, as what one takes is not the question. `transfers`: KV between
pages and slots against a copy between pinned memory and the device.

The last line is one JSON object: `ls[].{batch,tpot_ms,roofline_ms,fraction,bubble_ms,launch_ms}`,
`boarded[].{rows,pass_ms,over_alone,bubble_ms,launch_ms}`,
`transfers.{checkpoint,restore}_fraction`, `limits.{copy_gbs,to_host_gbs,to_device_gbs}`;
`bubble_ms` is how long of a pass the device had nothing to do between its stages, `launch_ms` how
long the host needed to launch all stages but the last. No GPU has run it yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from support.shapes import SHAPES

from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.device.cuda.device import CudaDevice, Sizes
from omniserve.gpuworker.device.cuda.gpu import Gpu, TorchGpu
from omniserve.gpuworker.device.cuda.kernels import Kernels
from omniserve.gpuworker.device.port import Event, KvPlaces, ParkedRows
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.dummy import DummyModel
from omniserve.gpuworker.model.weights import load_weights
from omniserve.gpuworker.requests import Request

PAGE_TOKENS = 64
COPY_BYTES = 1 << 30
BESIDE = 16
"""LS rows beside boarded ones."""
TRANSFER_TOKENS = 512


class Link(NamedTuple):
    """A slab that no server knows."""

    slab: npt.NDArray[Any]
    out_offset: int


class Pass(NamedTuple):
    """Times in ms."""

    whole: float
    bubble: float
    launch: float


class Bench:
    """One device, and what its passes take."""

    def __init__(
        self, gpu: Gpu, shape: ModelConfig, context: int, batch: int, boarded: int
    ) -> None:
        """batch, boarded: the largest ones."""
        config = self.config = replace(shape, context_tokens=context)
        dtype = torch.bfloat16 if gpu.device.type == "cuda" else torch.float32
        weights = load_weights(DummyModel(config), dtype)
        self._pages_each = -(-context // PAGE_TOKENS)
        self._context = context
        parked = max(1, boarded * (config.layers + 1))
        tokens = TRANSFER_TOKENS * config.layers
        pages = batch * self._pages_each
        sizes = Sizes(pages, PAGE_TOKENS, parked, batch, max(batch, boarded), tokens)
        kernels = Kernels.flashinfer(config, PAGE_TOKENS, dtype) or Kernels.plain(config)
        self.device = CudaDevice(gpu, config, weights, kernels, sizes)
        elements = 2 * (config.q_size + config.kv_size)
        elem: type[Any] = np.float32 if dtype == torch.float32 else np.uint16
        self._link: Any = Link(np.zeros((parked, elements), elem), elements - config.q_size)
        self.device.serve([self._link])
        kv_bytes = 2 * config.layers * config.kv_size * dtype.itemsize
        self.kv_token_bytes = kv_bytes
        tensors = [t for layer in weights.layers for t in vars(layer).values() if t is not None]
        self.weight_bytes = sum(t.nbytes for t in [*tensors, weights.head])

    def run(self, batch: int, boarded: int) -> Pass:
        """One pass of `batch` LS rows, with `boarded` parked rows at every stage."""
        device, layers = self.device, self.config.layers
        cohort = Cohort([self._decode(row) for row in range(batch)], PAGE_TOKENS)
        bubble_ns = device.bubble_ns
        parked = [self._parked(stage, boarded) for stage in range(layers + 1)]
        launch_ns = 0
        start_ns = time.perf_counter_ns()
        for stage in range(layers):
            _until(device.has_room)
            began_ns = time.perf_counter_ns()
            device.run(stage, [cohort], parked[stage])
            device.attend(stage, cohort)
            launch_ns += time.perf_counter_ns() - began_ns
        _until(device.has_room)
        nobody = np.zeros(batch + boarded, np.bool_)
        device.finish([cohort], parked[layers], nobody, _nothing)
        whole_ns = time.perf_counter_ns() - start_ns
        return Pass(*(ns / 1e6 for ns in (whole_ns, device.bubble_ns - bubble_ns, launch_ns)))

    def transfer_s(self, copy: Callable[[Any, KvPlaces], Event]) -> tuple[float, int]:
        """Returns the time and the bytes of a CHECKPOINT or RESTORE."""
        config = self.config
        in_slot = (config.heads + config.kv_heads) // config.kv_heads
        tokens = min(
            TRANSFER_TOKENS, self._context, in_slot * len(self._link.slab) // config.layers
        )
        layers, positions = np.divmod(np.arange(config.layers * tokens), tokens)
        slots, indices = np.divmod(np.arange(len(layers)), in_slot)
        arrays = (layers, positions // PAGE_TOKENS, positions % PAGE_TOKENS, slots, indices)
        start = time.perf_counter()
        event = copy(self._link, KvPlaces(*(array.astype(np.int32) for array in arrays)))
        self.device.transfers.start()
        _until(event.done)
        return time.perf_counter() - start, tokens * self.kv_token_bytes

    def _decode(self, row: int) -> Chunk:
        context = self._context
        request = Request("r", True, np.zeros(context, np.int64), context, 0, known=context)
        request.blocks = [row * self._pages_each + page for page in range(self._pages_each)]
        return Chunk(request, context - 1, 1)

    def _parked(self, stage: int, boarded: int) -> ParkedRows | None:
        if not boarded:
            return None
        rows = stage * boarded + np.arange(boarded)
        zeros = np.zeros(boarded, np.int32)
        ints = zeros.astype(np.int64)
        return ParkedRows(rows, zeros, rows.astype(np.int32), ints + self._context - 1, ints)


def measure(
    gpu: Gpu,
    shape: ModelConfig,
    context: int,
    batches: Sequence[int],
    boarded: Sequence[int],
    rounds: int,
) -> dict[str, Any]:
    """Everything; kinds of passes take turns."""
    limits = _limits(gpu)
    bench = Bench(gpu, shape, context, max(*batches, BESIDE), max(boarded))
    kinds = [(batch, 0) for batch in batches] + [(BESIDE, rows) for rows in boarded]
    taken: dict[tuple[int, int], list[Pass]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 3):  # graphs are made in the second pass of a kind
        for kind, passes in taken.items():
            times = bench.run(*kind)
            if turn >= 3:
                passes.append(times)
    medians = {
        kind: Pass(*(statistics.median(times) for times in zip(*passes, strict=True)))
        for kind, passes in taken.items()
    }
    ls = []
    for batch in batches:
        read = bench.weight_bytes + batch * context * bench.kv_token_bytes
        floor_ms = read / limits["copy_gbs"] / 1e6
        found = medians[batch, 0]
        row = {"batch": batch, "tpot_ms": found.whole, "roofline_ms": floor_ms}
        ls.append(row | {"fraction": floor_ms / found.whole} | _rest(found))
    alone = medians[BESIDE, boarded[0]].whole
    beside = []
    for rows in boarded:
        found = medians[BESIDE, rows]
        line = {"rows": rows, "pass_ms": found.whole, "over_alone": found.whole / alone}
        beside.append(line | _rest(found))
    transfers = bench.device.transfers
    kinds_of_copy = {
        "checkpoint": (transfers.export_tokens, limits["to_host_gbs"]),
        "restore": (transfers.import_tokens, limits["to_device_gbs"]),
    }
    fractions = {}
    for name, (copy, limit_gbs) in kinds_of_copy.items():
        rates = [
            size / time_s / 1e9 for time_s, size in (bench.transfer_s(copy) for _ in range(rounds))
        ]
        fractions[f"{name}_fraction"] = statistics.median(rates) / limit_gbs
    return {"ls": ls, "boarded": beside, "transfers": fractions, "limits": limits}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each LS sequence")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--boarded", type=int, nargs="+", default=[0, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_stages: this host has no CUDA device", file=sys.stderr)
        return 2
    report = {"shape": options.shape, "device": torch.cuda.get_device_name()} | measure(
        TorchGpu(),
        SHAPES[options.shape],
        options.context,
        options.batches,
        options.boarded,
        options.rounds,
    )
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    return 0


def _rest(found: Pass) -> dict[str, float]:
    return {"bubble_ms": found.bubble, "launch_ms": found.launch}


def _limits(gpu: Gpu) -> dict[str, float]:
    """Of plain copies: bytes read and written on the device; moved between it and the host."""
    size = COPY_BYTES if gpu.device.type == "cuda" else 1 << 20
    one, other = (gpu.zeros(size, dtype=torch.uint8) for _ in range(2))
    host, stream = gpu.pinned(size, dtype=torch.uint8), gpu.stream()

    def gbs(to: torch.Tensor, source: torch.Tensor, moved: int) -> float:
        times = []
        for _ in range(5):
            gpu.wait()
            start = time.perf_counter()
            stream.launch(lambda: to.copy_(source, non_blocking=True))
            gpu.wait()
            times.append(time.perf_counter() - start)
        return moved / statistics.median(times) / 1e9

    return {
        "copy_gbs": gbs(one, other, 2 * size),
        "to_host_gbs": gbs(host, one, size),
        "to_device_gbs": gbs(one, host, size),
    }


def _until(done: Callable[[], bool]) -> None:
    while not done():
        pass


def _nothing() -> None:
    """There is nothing to do meanwhile."""


if __name__ == "__main__":
    sys.exit(main())
