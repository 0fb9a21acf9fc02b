"""How soon best-effort work makes way, and what keeping its KV mirrored costs.

    python benchmarks/preemption.py --json

The last line is one JSON object.

`response`: while a prompt of 2,000 BE tokens runs as one chunk, an LS request is sent at a random
moment. `response_ms.{p50,p99}` is the time from when the worker's front has it to the start of its
first stage; `stage_ms` is a stage of that chunk with its attention, undisturbed: the LS request
has to wait for the stage under way, and for nothing else. `--shape` takes a shape with random
weights instead of the test model, for `--device cuda`; no GPU has run that yet.

`demotions`: the worker's test switch forces BE requests off the device and back; `demotions` is
how many it were, and `recomputed_tokens` must be 0.

`checkpoints`: an LS stream beside BE requests that prefill and decode on the device, alternating
between a worker that mirrors them to attention servers and one that does not. `tpot_ms_mirrored`,
`tpot_ms_unmirrored`, their quotient `tpot_ratio`, and `lag_tokens.{p50,max}`: computed tokens that
no arena has yet, over all BE requests on the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from support.load import NO_HURRY, Arrival, Load, Slo, makespan_s
from support.shapes import SHAPES, served_as
from support.telemetry import LagSampler, settled, wait_empty
from support.worker import serve
from support.worker_stack import WorkerStack

from omniserve.client.bench.metrics import percentile, tpots_ms

CHUNK_TOKENS = 2000
URGENT = Slo(ttft_ms=50, tpot_ms=50)
"""Nothing of a 2,000-token chunk fits before such a request."""
BE_PROMPT = Arrival(0.0, CHUNK_TOKENS, 1, best_effort=True)
DEMOTED = [Arrival(0.0, 200, 96, best_effort=True)] * 16
BESIDE = [Arrival(0.0, 256, 64, best_effort=True)] * 400
"""More than a stream of `STREAM` sees the end of."""
STREAM = Arrival(1.0, 64, 128)
PARTS = ("response", "demotions", "checkpoints")


def main() -> int:
    options = _options()
    report: dict[str, Any] = {}
    measures = {"response": _response, "demotions": _demotions, "checkpoints": _checkpoints}
    for part in options.parts:
        result = measures[part](options)
        print(f"{part}: {result}", file=sys.stderr, flush=True)
        report |= result
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shape", choices=SHAPES, help="of response: instead of the test model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="with --shape")
    parser.add_argument("--rounds", type=int, default=100, help="of response (default 100)")
    parser.add_argument("--demotions", type=int, default=100, help="at least (default 100)")
    parser.add_argument("--streams", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    options = parser.parse_args()
    if options.device != "cpu" and not options.shape:
        parser.error("--device: a shape is needed")
    return options


def _response(options: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    waits_ms: list[float] = []
    flags: dict[str, Any] = {"servers": 2, "pages": 256, "prefill_chunk_tokens_max": CHUNK_TOKENS}
    with ExitStack() as ended:
        if options.shape:
            shape = SHAPES[options.shape]
            flags |= ended.enter_context(served_as(shape, 2 * CHUNK_TOKENS, options.device))
        stack = ended.enter_context(serve(device_kv_tokens=16384, **flags))
        load = Load(stack.worker.address, URGENT, seed=0)
        load.run([BE_PROMPT, Arrival(0.0, 64, 8)])  # warms up
        stage_ms, chunk_s = _undisturbed(stack, load)
        while len(waits_ms) < options.rounds:
            before = settled(stack)
            at_s = rng.uniform(0.1, 0.8) * chunk_s
            chunk, urgent = load.run([BE_PROMPT, Arrival(at_s, 16, 1)])
            if urgent.record.token_times_s[0] > chunk.record.token_times_s[0]:
                print("the chunk had ended before: left out", file=sys.stderr)
                continue
            after = settled(stack)
            assert after.ls_started - before.ls_started == 1, "one LS request a round"
            waits_ms.append((after.ls_queue_ns - before.ls_queue_ns) / 1e6)
    p99_ms = percentile(waits_ms, 99) or 0.0
    return {
        "model": f"{options.shape or 'SmolLM2-135M'} on {options.device}",
        "response_ms": {"p50": round(statistics.median(waits_ms), 2), "p99": round(p99_ms, 2)},
        "stage_ms": round(stage_ms, 2),
        "p99_over_stage": round(p99_ms / stage_ms, 3),
        "rounds": len(waits_ms),
    }


def _undisturbed(stack: WorkerStack, load: Load) -> tuple[float, float]:
    """Returns the time of one stage of the chunk, in ms, and of all of it, in s: medians."""
    stages_ms, chunks_s = [], []
    for _ in range(5):
        before = settled(stack)
        chunks_s.append(makespan_s(load.run([BE_PROMPT])))
        after = settled(stack)
        stages = after.be_only_stages - before.be_only_stages
        stages_ms.append((after.busy_ns - before.busy_ns) / stages / 1e6)
    return statistics.median(stages_ms), statistics.median(chunks_s)


def _demotions(options: argparse.Namespace) -> dict[str, Any]:
    with serve(device_kv_tokens=16384, servers=2, pages=256, fault_moves_per_pass=0.05) as stack:
        load = Load(stack.worker.address, NO_HURRY, seed=0)
        while (telemetry := settled(stack)).demotions < options.demotions:
            makespan_s(load.run(DEMOTED))  # also checks that every request got all of its tokens
    return {
        "demotions": telemetry.demotions,
        "promotions": telemetry.promotions,
        "recomputed_tokens": telemetry.recomputed_tokens,
    }


def _checkpoints(options: argparse.Namespace) -> dict[str, Any]:
    tpot_ms: dict[str, list[float]] = {"mirrored": [], "unmirrored": []}
    lags: list[int] = []
    flags: dict[str, Any] = {"device_kv_tokens": 65536, "orphan_lease_s": 0}
    with (
        serve(servers=2, sequences=256, pages=2560, **flags) as mirrored,
        serve(be_placement="device", **flags) as unmirrored,
    ):
        for _ in range(options.streams):
            for name, stack in (("mirrored", mirrored), ("unmirrored", unmirrored)):
                load = Load(stack.worker.address, NO_HURRY, seed=0)
                with LagSampler(stack) as sampler:
                    sent, _ = load.run_beside([STREAM], BESIDE)
                tpot_ms[name] += tpots_ms([s.record for s in sent])
                if stack is mirrored:
                    lags += sampler.lag_tokens
                wait_empty(stack)
    medians = {name: statistics.median(values) for name, values in tpot_ms.items()}
    return {
        "tpot_ms_mirrored": round(medians["mirrored"], 2),
        "tpot_ms_unmirrored": round(medians["unmirrored"], 2),
        "tpot_ratio": round(medians["mirrored"] / medians["unmirrored"], 3),
        "lag_tokens": {"p50": statistics.median(lags), "max": max(lags)},
        "streams": options.streams,
    }


if __name__ == "__main__":
    sys.exit(main())
