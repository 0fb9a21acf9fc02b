"""How well the worker predicts its iterations, beside how well anything could.

One worker with two attention servers. First and last the same batches again and again (one stream
that decodes, one prompt of a fixed length, and without LS a BE backlog of equal requests): how far
such an iteration is from the median of its kind is the noise floor. In between a mixed run: LS
requests that arrive at random beside a backlog of BE requests, which prefill, decode on the device
and board. Every iteration's prediction is recorded before it is launched; accuracy is
1 - |predicted - measured| / measured.

    python benchmarks/latency_model.py --json

The last line is one JSON object: `mean` and `p10` (exceeded by 90 %) over the iterations of the
mixed run, `by_regime` (the same with `iterations`), `noise_floor` (`mean`, `p10`, over the repeated
batches, each regime weighing as much as in the mixed run), `of_floor` (both over the floor's),
`decision_share` (of the time of the iterations, what decisions took), and `cut_short`: iterations
from which BE left on the way, whose prediction was of another plan; they are in no accuracy.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.prompts import real_prompts
from support.worker_stack import Stream, WorkerStack

from omniserve.internal.v1 import worker_pb2
from omniserve.v1 import types_pb2

Iteration = dict[str, Any]
SLO = types_pb2.Slo(ttft_ms=1000, tpot_ms=100)
PROMPT_TOKENS = 200
# Short prompts, so that BE has rows in the parking lot before the run is over.
BACKLOG = 32
BACKLOG_PROMPT_TOKENS = 100
REPEATED_S = 6.0
"""Of the backlog alone."""


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "iterations.jsonl"
        flags = {
            "dtype": "bfloat16",
            "threads": options.threads,
            "device-kv-tokens": 4096,
            "latency-cache-dir": folder,  # measured now: nobody knows who kept the host busy then
            "iteration-log": log,
            "policy": options.policy,
        }
        with WorkerStack(server_flags={"background": True}, worker_flags=flags) as stack:
            _mix(stack, options.seconds / 4, seed=1)  # the factors settle
            before = _timed(lambda: _repeat(stack))
            mixed = _timed(lambda: _mix(stack, options.seconds, seed=0))
            after = _timed(lambda: _repeat(stack))
            stack.worker.terminate()
        iterations = [json.loads(line) for line in log.read_text().splitlines()]
    report = _report(iterations, mixed, [before, after])
    if options.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:12} {value}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40, help="mixed run (default 40)")
    parser.add_argument("--threads", type=int, default=2, help="of the worker (default 2)")
    parser.add_argument("--policy", default="omniserve", help="of the worker (default omniserve)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    return parser.parse_args()


def _timed(work: Any) -> tuple[int, int]:
    """Returns begin and end on the clock that the engine uses."""
    begin = time.monotonic_ns()
    work()
    return begin, time.monotonic_ns()


def _repeat(stack: WorkerStack) -> None:
    """The same batches: a decoding stream, a prompt several times, equal BE requests."""
    prompt = real_prompts()[0][:PROMPT_TOKENS]
    _start(stack, prompt, 128).finish()
    for _ in range(8):
        _start(stack, prompt[::-1], 1).finish()
    alike = prompt[:BACKLOG_PROMPT_TOKENS]
    backlog = [_start(stack, alike, 512, best_effort=True) for _ in range(BACKLOG)]
    time.sleep(REPEATED_S)
    for stream in backlog:
        stream.call.cancel()


def _mix(stack: WorkerStack, seconds: float, seed: int) -> None:
    """LS requests one a second on average, beside a backlog; returns when all have ended."""
    draw = random.Random(seed)
    prompts = [prompt[:600] for prompt in real_prompts()]
    until = time.monotonic() + seconds
    backlog = [
        _start(stack, prompt[:BACKLOG_PROMPT_TOKENS], 128, best_effort=True)
        for prompt in draw.choices(prompts, k=BACKLOG)
    ]
    chats = []
    while time.monotonic() < until:
        chats.append(_start(stack, draw.choice(prompts), draw.randint(8, 80)))
        time.sleep(min(draw.expovariate(1.0), max(0.0, until - time.monotonic())))
    for stream in chats:
        stream.finish()
    for stream in backlog:
        stream.call.cancel()


def _start(
    stack: WorkerStack, prompt: list[int], tokens: int, *, best_effort: bool = False
) -> Stream:
    request = worker_pb2.WorkerServiceGenerateRequest(
        request_id=uuid.uuid4().hex,
        prompt_token_ids=prompt,
        service_class=(
            types_pb2.SERVICE_CLASS_BEST_EFFORT
            if best_effort
            else types_pb2.SERVICE_CLASS_LATENCY_SENSITIVE
        ),
        sampling=types_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True),
        slo=SLO,
    )
    return Stream(stack.stub.Generate(request), request.request_id)


def _report(
    iterations: list[Iteration], mixed: tuple[int, int], repeats: list[tuple[int, int]]
) -> dict[str, Any]:
    live = _within(iterations, mixed)
    whole = [i for i in live if not i["cut_short"]]
    by_regime: dict[str, list[float]] = defaultdict(list)
    for i in whole:
        by_regime[i["regime"]].append(_accuracy(i["predicted_ns"], i["measured_ns"]))
    figures = _figures([a for accuracies in by_regime.values() for a in accuracies])
    floor = _floor(
        [_within(iterations, span) for span in repeats],
        {regime: len(values) for regime, values in by_regime.items()},
    )
    return {
        **figures,
        "by_regime": {name: _figures(values) for name, values in sorted(by_regime.items())},
        "noise_floor": floor,
        "of_floor": {name: round(figures[name] / floor[name], 4) for name in ("mean", "p10")},
        "decision_share": round(
            sum(i["decision_ns"] for i in live) / sum(i["measured_ns"] for i in live), 4
        ),
        "cut_short": len(live) - len(whole),
    }


def _within(iterations: list[Iteration], span: tuple[int, int]) -> list[Iteration]:
    return [i for i in iterations if span[0] <= i["decided_ns"] < span[1]]


def _floor(repeats: list[list[Iteration]], live: dict[str, int]) -> dict[str, Any]:
    """Accuracy of the median of all like iterations, of those before and after together.

    `live` is how many iterations the mixed run had of each regime: so much they weigh.
    """
    kinds: dict[tuple[str, int], list[int]] = defaultdict(list)
    for iterations in repeats:
        for i in iterations:
            if not i["cut_short"]:
                kinds[i["regime"], i["rows"]].append(i["measured_ns"])
    accuracies: dict[str, list[float]] = defaultdict(list)
    for (regime, _), times in kinds.items():
        if len(times) >= 8:
            accuracies[regime] += [_accuracy(float(np.median(times)), t) for t in times]
    values, weights = [], []
    for regime, of_regime in accuracies.items():
        values += of_regime
        weights += [live.get(regime, 0) / len(of_regime)] * len(of_regime)
    p10 = np.quantile(values, 0.1, weights=weights, method="inverted_cdf")
    return {
        "mean": round(float(np.average(values, weights=weights)), 4),
        "p10": round(float(p10), 4),
        "iterations": len(values),
    }


def _accuracy(predicted_ns: float, measured_ns: float) -> float:
    return 1.0 - abs(predicted_ns - measured_ns) / measured_ns


def _figures(accuracies: list[float]) -> dict[str, Any]:
    values = np.asarray(accuracies)
    return {
        "mean": round(float(values.mean()), 4),
        "p10": round(float(np.percentile(values, 10)), 4),
        "iterations": len(values),
    }


if __name__ == "__main__":
    raise SystemExit(main())
