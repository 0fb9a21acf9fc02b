"""What eight best-effort requests on stopped attention servers cost a latency-sensitive stream.

Starts two attention servers and a worker, then alternates rounds of one LS request: without BE,
and with eight BE requests whose servers got SIGSTOP while they were decoding through them. The
worker never waits for a CPU, so the LS time per output token must be the same in both. TPOT is the
median over all gaps between tokens of all rounds of a kind.

    python benchmarks/independence.py --json

The last line is one JSON object: `tpot_ms_alone`, `tpot_ms_stopped`, `tpot_ratio` (stopped over
alone), `ring_waits` (of the worker, must be 0), `rounds` and `gaps` per kind.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.prompts import real_prompts
from support.stack import wait_for
from support.worker_stack import Stream, WorkerStack

BE_REQUESTS = 8
BEGUN = 4
"""Tokens after which a BE request certainly decodes through its server."""


def main() -> int:
    options = _options()
    flags = {"be-placement": "host", "dtype": options.dtype, "threads": options.threads}
    gaps: dict[str, list[float]] = {"alone": [], "stopped": []}
    with WorkerStack(server_flags={"background": True}, worker_flags=flags) as stack:
        _ls_gaps_ms(stack, options.tokens)  # warms up
        for number in range(options.rounds):
            gaps["alone"] += _ls_gaps_ms(stack, options.tokens)
            streams = _stop_in_mid_decode(stack)
            gaps["stopped"] += _ls_gaps_ms(stack, options.tokens)
            stack.signal_servers(signal.SIGCONT)
            for stream in streams:
                stream.finish()
            medians = {kind: f"{statistics.median(g):.2f} ms" for kind, g in gaps.items()}
            print(f"round {number + 1} of {options.rounds}: {medians}", file=sys.stderr)
        ring_waits = stack.telemetry().ring_waits
    alone, stopped = (statistics.median(gaps[kind]) for kind in ("alone", "stopped"))
    report = {
        "tpot_ms_alone": round(alone, 3),
        "tpot_ms_stopped": round(stopped, 3),
        "tpot_ratio": round(stopped / alone, 4),
        "ring_waits": ring_waits,
        "rounds": options.rounds,
        "gaps": len(gaps["alone"]),
        "dtype": options.dtype,
    }
    if options.json:
        print(json.dumps(report))
    else:
        print("\n".join(f"{name:16} {value}" for name, value in report.items()))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--tokens", type=int, default=200, help="LS tokens a round (default 200)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="of the worker (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    return parser.parse_args()


def _ls_gaps_ms(stack: WorkerStack, tokens: int) -> list[float]:
    """Runs one LS request; returns the times between its tokens at the client, in ms."""
    stream = stack.start(real_prompts()[1], tokens + 1, ignore_eos=True)
    stream.read(1)
    gaps = []
    last_ns = time.perf_counter_ns()
    while len(stream.tokens) < tokens + 1:
        before = len(stream.tokens)
        stream.read(before + 1)
        now_ns = time.perf_counter_ns()
        arrived = len(stream.tokens) - before
        gaps += [(now_ns - last_ns) / arrived / 1e6] * arrived
        last_ns = now_ns
    stream.finish()
    return gaps


def _stop_in_mid_decode(stack: WorkerStack) -> list[Stream]:
    """Returns BE requests of which every one waits for a stopped server."""
    prompts = [prompt for prompt in real_prompts() if len(prompt) < 200][:BE_REQUESTS]
    streams = stack.start_all(prompts, 64, best_effort=True, ignore_eos=True)
    for stream in streams:
        stream.read(BEGUN)
    stack.signal_servers(signal.SIGSTOP)
    wait_for("rows away", lambda: stack.telemetry().rows_away == BE_REQUESTS)
    return streams


if __name__ == "__main__":
    sys.exit(main())
