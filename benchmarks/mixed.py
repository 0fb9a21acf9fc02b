"""A chat load with a batch job beside it: do the chats keep their objectives, is the job done soon?

Latency-sensitive requests arrive as a Poisson process for a minute, `alone` and with a backlog of
64 best-effort requests that are all there at the start; with `ample` device KV, so that every
request fits, and `tight`, so that most best-effort requests cannot decode on the device.

    python benchmarks/mixed.py --json

The last line is one JSON object: per case `ample|tight.{alone,with_be}` the keys `ls_attainment`
(requests that met TTFT and TPOT over all sent), `ls_requests`, `ls_ttft_p99_ms`, `ls_tpot_p99_ms`,
`be_makespan_s` (from the start to the last token of the backlog), `be_tokens_per_s` (over that
time), `tokens_by_path` and `cores` (busy, per process). Every case is its own start of the stack.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from support.cpu_time import CpuTime
from support.lengths import LogNormal
from support.load import Arrival, Load, Slo, ls_figures, makespan_s
from support.telemetry import settled, tokens_by_path
from support.worker import pages_for, serve

from omniserve.client.bench.arrivals import arrival_times_s

PROMPT = LogNormal(mean=200, cap=800, sigma=0.8)
OUTPUT = LogNormal(mean=80, cap=200, sigma=0.6)
BATCH = Arrival(0.0, 1000, 128, best_effort=True)
DEVICE_KV_TOKENS = {"ample": 5120 * 32, "tight": 16384}
"""Ample: half of it, BE's share at the start, holds the whole backlog."""
SERVERS = 2
CASES = tuple(f"{kv}.{load}" for kv in DEVICE_KV_TOKENS for load in ("alone", "with_be"))


def main() -> int:
    options = _options()
    report: dict[str, Any] = {}
    for case in options.cases:
        kv, _, load = case.partition(".")
        backlog = [BATCH] * (options.backlog if load == "with_be" else 0)
        result = _measure(DEVICE_KV_TOKENS[kv], backlog, options)
        report.setdefault(kv, {})[load] = result
        print(f"{case}: {result}", file=sys.stderr, flush=True)
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--duration-s", type=float, default=60.0, help="of arrivals (default 60)")
    parser.add_argument("--rate", type=float, default=1.0, help="LS requests a second (default 1)")
    parser.add_argument("--backlog", type=int, default=64, help="BE requests (default 64)")
    parser.add_argument("--slo-ttft-ms", type=float, default=425.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=45.0)
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    return parser.parse_args()


def _measure(
    device_kv_tokens: int, backlog: Sequence[Arrival], options: argparse.Namespace
) -> dict[str, Any]:
    chats, slo = _chats(options), Slo(options.slo_ttft_ms, options.slo_tpot_ms)
    whole = options.backlog * pages_for(BATCH.prompt_tokens + BATCH.output_tokens)
    with serve(
        device_kv_tokens=device_kv_tokens, servers=SERVERS, pages=whole // SERVERS + 64
    ) as stack:
        load = Load(stack.worker.address, slo, options.seed)
        load.run([Arrival(0.0, 64, 8)])  # warms up
        before, cpu = settled(stack), CpuTime(stack)
        sent = load.run([*chats, *backlog])
        cores = cpu.cores()
        by_path = tokens_by_path(before, settled(stack))
    result = ls_figures(sent[: len(chats)], slo)
    if backlog:
        seconds = makespan_s(sent[len(chats) :])
        result["be_makespan_s"] = round(seconds, 2)
        result["be_tokens_per_s"] = round(sum(a.output_tokens for a in backlog) / seconds, 1)
        result["tokens_by_path"] = by_path
    return result | {"cores": cores}


def _chats(options: argparse.Namespace) -> list[Arrival]:
    rng = np.random.default_rng(options.seed)
    times = arrival_times_s(options.rate, 1.0, options.duration_s, options.seed)
    return [Arrival(at_s, PROMPT.draw(rng), OUTPUT.draw(rng)) for at_s in times]


if __name__ == "__main__":
    sys.exit(main())
