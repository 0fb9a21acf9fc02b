"""Policies side by side with a model's shape and random weights: LS in bursts, BE in long contexts.

    python benchmarks/gpu_policies.py --shape llama-3-8b --json

Every policy gets a new worker and attention server, a backlog of BE requests with `--be-context`
tokens each that does not end, and after `--settle-s` the same LS requests: Gamma arrivals with CV
3, lengths of a conversation trace. The device's KV is limited to `--device-kv-gb`; the server keeps
`--sequences` BE sequences: at the defaults 34 GB on the tmpfs of /dev/shm.

With `--json` a line follows every run, so that one that is cut off leaves what it had. The last
line is one JSON object: `policies[].{name,ls_attainment,ls_attainment_ci,ls_requests,
ls_completed,ls_ttft_p99_ms,ls_tpot_p99_ms,be_tokens_per_s,servers_read_gbs,tokens_by_path}`,
`host_read_gbs` and `omniserve.{points_below_ls_only,be_over_reserve,be_over_preempt,
be_over_sync_offload,servers_read_fraction}`. No GPU has run it yet; `--device cpu` tries it
without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.coserve_report import pooled_ls
from support.coserve_runs import CoserveLoad, Runs
from support.lengths import conversation
from support.load import Arrival, Slo
from support.shapes import SHAPES, served_as
from support.worker import PAGE_TOKENS

from omniserve.gpuworker.model.config import ModelConfig

TRACE = Path(__file__).parents[1] / "../shared/traces/azure2023_conv.csv.gz"
POLICIES = ("ls-only", "omniserve", "reserve", "preempt", "sync-offload")
BF16 = 2


def main() -> int:
    options = _options()
    shape = SHAPES[options.shape]
    with served_as(shape, options.be_context + PAGE_TOKENS, options.device) as model:
        load = _load(options, shape, model)
        runs = Runs(None, options.seeds * len(options.policies))
        for seed in range(options.seeds):
            for policy in options.policies:
                headroom = options.headroom if policy == "reserve" else None
                runs.make(load, policy, headroom, options.rate, seed)
                if options.json:
                    print(json.dumps(_report(options, load, runs)), flush=True)
    if not options.json:
        print(json.dumps(_report(options, load, runs), indent=2))
    return 0


def _report(options: argparse.Namespace, load: CoserveLoad, runs: Runs) -> dict[str, Any]:
    return {
        "shape": options.shape,
        "device": options.device,
        "lengths": load.lengths.source,
        "slo": {"ttft_ms": load.slo.ttft_ms, "tpot_ms": load.slo.tpot_ms},
        "rate_per_s": options.rate,
        "headroom": options.headroom,
    } | summary(runs.done)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the runs say together: a line per policy, and ours beside the others; null where a rival
    did nothing for BE."""
    names = dict.fromkeys(run["policy"] for run in runs)
    lines = {name: _line(name, [run for run in runs if run["policy"] == name]) for name in names}
    host_gbs = max(run["read_bytes_per_s"] for run in runs) / 1e9
    report: dict[str, Any] = {"policies": list(lines.values()), "host_read_gbs": host_gbs}
    ours = lines.get("omniserve")
    if ours is None:
        return report
    compared: dict[str, float | None] = {
        "servers_read_fraction": ours["servers_read_gbs"] / host_gbs
    }
    for name, line in lines.items():
        if name == "ls-only":
            points = 100 * (line["ls_attainment"] - ours["ls_attainment"])
            compared["points_below_ls_only"] = points
        elif name != "omniserve":
            theirs = line["be_tokens_per_s"]
            ratio = ours["be_tokens_per_s"] / theirs if theirs else None
            compared[f"be_over_{name.replace('-', '_')}"] = ratio
    return report | {"omniserve": compared}


def _line(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def mean(key: str) -> float:
        return statistics.fmean(run[key] for run in runs)

    paths = [run["tokens_by_path"] for run in runs]
    return {
        "name": name,
        **pooled_ls([request for run in runs for request in run["requests"]]),
        "be_tokens_per_s": mean("be_tokens_per_s"),
        "servers_read_gbs": mean("servers_read_bytes_per_s") / 1e9,
        "tokens_by_path": {path: sum(p[path] for p in paths) for path in paths[0]},
    }


def _load(options: argparse.Namespace, shape: ModelConfig, model: dict[str, Any]) -> CoserveLoad:
    token_bytes = 2 * BF16 * shape.layers * shape.kv_size
    pages = int(options.device_kv_gb * 1e9 / token_bytes) // PAGE_TOKENS
    return CoserveLoad(
        lengths=conversation(options.trace, options.length_scale, options.output_cap),
        slo=Slo(options.slo_ttft_ms, options.slo_tpot_ms),
        duration_s=options.duration_s,
        settle_s=options.settle_s,
        device_kv_tokens=pages * PAGE_TOKENS,
        sequences=options.sequences,
        backlog=options.backlog,
        be=Arrival(0.0, options.be_context - options.be_output, options.be_output, True),
        servers=1,
        limits_threads=options.server_threads,
        serve_flags={**model, "server_flags": {"threads": options.server_threads}},
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--headroom", type=float, default=0.2, help="of `reserve`, the only one")
    parser.add_argument("--seeds", type=int, default=1, help="of LS arrivals, pooled")
    parser.add_argument("--rate", type=float, default=8.0, help="LS requests a second")
    parser.add_argument("--duration-s", type=float, default=20.0, help="of LS arrivals")
    parser.add_argument("--settle-s", type=float, default=15.0, help="of the backlog before them")
    parser.add_argument("--device-kv-gb", type=float, default=8.0)
    parser.add_argument("--sequences", type=int, default=32, help="BE sequences at the server")
    parser.add_argument("--backlog", type=int, default=512, help="BE requests in all")
    parser.add_argument("--be-context", type=int, default=8192, help="tokens, the output's too")
    parser.add_argument("--be-output", type=int, default=512)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--server-threads", type=int, default=max(1, cores - 2))
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--length-scale", type=float, default=0.5, help="of the trace's lengths")
    parser.add_argument("--output-cap", type=int, default=200, help="tokens of an LS answer")
    parser.add_argument("--slo-ttft-ms", type=float, default=1000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=50.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object a run")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
