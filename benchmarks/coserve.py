"""Chats beside a best-effort backlog under every policy, against `ls-only` and against a roofline.

LS arrivals are Gamma with CV 3, their lengths those of a conversation trace scaled to the model;
the load is 70 % of the highest rate at which `ls-only` still attains 0.95, found by bisection. BE
is a backlog of requests of 256 in, 1,024 out that does not end. Every run is a new start of the
stack: the backlog settles, then LS arrives for `--duration-s`, with one seed after the other until
500 LS requests are pooled per policy.

    python benchmarks/coserve.py --json --runs runs/coserve.jsonl

A finished run is a line of the file `--runs`; a later call goes on where the file ends, and makes
`--runs-max` more at most. The last line of output is one JSON object with `policies[].{name,
ls_attainment,ls_attainment_ci,ls_ttft_p99_ms,ls_tpot_p99_ms,be_tokens_per_s,
be_roofline_tokens_per_s,tokens_by_path}`, `rate_per_s`, `saturation_per_s` and the machine's
limits, which are measured before every run: hosts change. `ls_attainment_ci` is the 95 % interval
of a bootstrap over requests. `reserve` is the best of three headrooms, which it names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import coserve_report
from support.coserve_runs import CoserveLoad, Runs, saturation_per_s
from support.lengths import conversation
from support.load import Slo

TRACE = Path(__file__).parents[1] / "../shared/traces/azure2023_conv.csv.gz"
POLICIES = ("omniserve", "ls-first", "reserve", "sync-offload", "preempt", "ls-only")
HEADROOMS = (0.2, 0.4, 0.6)
LOAD = 0.7


def main() -> int:
    options = _options()
    load = CoserveLoad(
        lengths=conversation(options.trace, options.length_scale, options.output_cap),
        slo=Slo(options.slo_ttft_ms, options.slo_tpot_ms),
        duration_s=options.duration_s,
        settle_s=options.settle_s,
        device_kv_tokens=options.device_kv_tokens,
        sequences=options.sequences,
        backlog=3 * options.sequences,
    )
    runs = Runs(options.runs, options.runs_max)
    saturation = options.saturation
    if saturation is None and options.rate is None:
        saturation = saturation_per_s(load, runs, options.saturation_max)
    rate = options.rate
    if rate is None and saturation is not None:
        rate = LOAD * saturation
    if rate is not None:
        seeds = range(load.seeds(rate, options.requests))
        configurations = list(_configurations(options.policies, options.headrooms))
        _make_runs(load, rate, seeds, runs, configurations)
    report = coserve_report.pooled(runs.done, load)
    report |= {"saturation_per_s": saturation, "complete": not runs.exhausted}
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument(
        "--headrooms",
        nargs="+",
        type=float,
        default=HEADROOMS,
        help="of `reserve`; the best counts",
    )
    parser.add_argument("--runs", type=Path, help="file of finished runs (default: none is kept)")
    parser.add_argument("--runs-max", type=int, default=10_000, help="more runs in this call")
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--length-scale", type=float, default=0.25, help="of the trace's lengths")
    parser.add_argument("--output-cap", type=int, default=200, help="tokens of an LS answer")
    parser.add_argument("--slo-ttft-ms", type=float, default=1000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=50.0)
    parser.add_argument("--duration-s", type=float, default=150.0, help="of LS arrivals in a run")
    parser.add_argument("--settle-s", type=float, default=45.0, help="of the backlog before them")
    parser.add_argument("--device-kv-tokens", type=int, default=8192)
    parser.add_argument(
        "--requests", type=int, default=500, help="LS requests per policy at least (default 500)"
    )
    parser.add_argument("--sequences", type=int, default=256, help="BE requests in flight")
    parser.add_argument("--saturation", type=float, help="LS requests a second; skips bisection")
    parser.add_argument(
        "--saturation-max", type=float, default=8.0, help="where bisection begins (default 8)"
    )
    parser.add_argument("--rate", type=float, help="LS requests a second; skips both")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    return parser.parse_args()


def _make_runs(
    load: CoserveLoad,
    rate: float,
    seeds: Sequence[int],
    runs: Runs,
    configurations: Sequence[tuple[str, float | None]],
) -> None:
    """All policies with one seed after the other, so that a host's drift meets them alike."""
    policies = list(dict.fromkeys(policy for policy, _ in configurations))
    for seed in seeds:
        for policy, headroom in configurations:
            runs.make(load, policy, headroom, rate, seed)
            if policy == "ls-only" and seed == seeds[0]:
                for line in coserve_report.rooflines(runs.done, load, policies):
                    print(line, file=sys.stderr, flush=True)


def _configurations(
    policies: Sequence[str], headrooms: Sequence[float]
) -> Iterator[tuple[str, float | None]]:
    """`ls-only` first: the rooflines of the others need what it did."""
    yield "ls-only", None
    for policy in policies:
        if policy == "reserve":
            yield from ((policy, headroom) for headroom in headrooms)
        elif policy != "ls-only":
            yield policy, None


if __name__ == "__main__":
    sys.exit(main())
