"""What the runs of `coserve.py` say together: a line per policy, beside its roofline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from support.coserve_runs import BE, CoserveLoad
from support.roofline import BeWork, LsLoad, Machine, Model, tokens_per_s
from support.worker import KV_BYTES_PER_TOKEN, LAYER_PARAMETERS, PARAMETERS

from omniserve.client.bench.metrics import percentile

MODEL = Model(PARAMETERS, LAYER_PARAMETERS, KV_BYTES_PER_TOKEN)
THROUGH_SERVERS = ("omniserve", "sync-offload")
CLOSE = 0.01
"""Of the attainment of `ls-only`: who is below is not compared by throughput."""
_RESAMPLES = 2000

Runs = Sequence[dict[str, Any]]


def rooflines(runs: Runs, load: CoserveLoad, policies: Sequence[str]) -> Iterator[str]:
    """Lines to print before the policies run: contexts are taken as half of the way."""
    if not _ls_runs(runs):
        return
    machine = _machine(_ls_runs(runs))
    yield (
        f"reads {machine.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"matrices {machine.matrix_flops / 1e9:.0f} GFLOP/s"
    )
    context = BE.prompt_tokens + BE.output_tokens / 2
    ls = _ls_load(runs)
    for policy in policies:
        bound = _roofline(policy, None, context, load, machine, ls)
        yield f"{policy}: at most {bound:.0f} BE tokens/s"


def pooled(runs: Runs, load: CoserveLoad) -> dict[str, Any]:
    """The report, of the rate that most runs were made at: others belong to the bisection."""
    rates = [run["rate_per_s"] for run in runs if run["policy"] != "ls-only"] or [
        run["rate_per_s"] for run in runs
    ]
    report: dict[str, Any] = {
        "lengths": load.lengths.source,
        "slo": {"ttft_ms": load.slo.ttft_ms, "tpot_ms": load.slo.tpot_ms},
        "policies": [],
    }
    if not rates:
        return report
    rate = rates[-1]
    here = sorted(
        (run for run in runs if run["rate_per_s"] == rate),
        key=lambda run: (run["policy"], run["headroom"] or 0.0),
    )
    groups = itertools.groupby(here, key=lambda run: (run["policy"], run["headroom"]))
    ls = _ls_load(here)
    lines = [_line(*key, list(group), load, ls) for key, group in groups]
    return report | {"rate_per_s": rate, "policies": _best_headroom(lines)}


def pooled_ls(requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the LS requests of some runs."""
    met = np.array([request["met"] for request in requests], dtype=float)
    ttfts = [r["ttft_ms"] for r in requests if r["ttft_ms"] is not None]
    tpots = [r["tpot_ms"] for r in requests if r["tpot_ms"] is not None]
    return {
        "ls_attainment": round(float(met.mean()), 4),
        "ls_attainment_ci": _bootstrap(met),
        "ls_requests": len(requests),
        "ls_completed": sum(r["completed"] for r in requests),
        "ls_ttft_p99_ms": round(percentile(ttfts, 99) or 0.0, 1),
        "ls_tpot_p99_ms": round(percentile(tpots, 99) or 0.0, 2),
    }


def _line(
    policy: str,
    headroom: float | None,
    runs: Runs,
    load: CoserveLoad,
    ls: LsLoad,
) -> dict[str, Any]:
    machine = _machine(runs)
    contexts = [run["be_context_tokens"] for run in runs if run["be_context_tokens"]]
    context = float(np.mean(contexts)) if contexts else BE.prompt_tokens + BE.output_tokens / 2
    by_path = [run["tokens_by_path"] for run in runs]
    line = {
        "name": policy,
        **pooled_ls([request for run in runs for request in run["requests"]]),
        "be_tokens_per_s": round(_mean(runs, "be_tokens_per_s"), 1),
        "be_roofline_tokens_per_s": round(
            _roofline(policy, headroom, context, load, machine, ls), 1
        ),
        "be_context_tokens": round(context),
        "read_gbs": round(machine.read_bytes_per_s / 1e9, 1),
        "gemm_gflops": round(machine.matrix_flops / 1e9, 1),
        "tokens_by_path": {path: sum(paths[path] for paths in by_path) for path in by_path[0]},
        "cores": {
            name: round(float(np.mean([r["cores"][name] for r in runs])), 3)
            for name in runs[0]["cores"]
        },
    }
    return line | ({"headroom": headroom} if headroom is not None else {})


def _best_headroom(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of `reserve`, keeps the headroom with most BE tokens that stays close to `ls-only`."""
    yardstick = next((x["ls_attainment"] for x in lines if x["name"] == "ls-only"), 0.0)
    reserved = [line for line in lines if line["name"] == "reserve"]
    close = [line for line in reserved if line["ls_attainment"] >= yardstick - CLOSE]
    rest = [line for line in lines if line["name"] != "reserve"]
    if close:
        return [*rest, max(close, key=lambda line: line["be_tokens_per_s"])]
    return [*rest, *sorted(reserved, key=lambda line: line["ls_attainment"])[-1:]]


def _roofline(
    policy: str,
    headroom: float | None,
    context_tokens: float,
    load: CoserveLoad,
    machine: Machine,
    ls: LsLoad,
) -> float:
    if policy == "ls-only":
        return 0.0
    rows = int(load.device_kv_tokens * (1.0 - (headroom or 0.0)) / context_tokens)
    if policy in THROUGH_SERVERS:
        rows += load.sequences // 2
    work = BeWork(BE.prompt_tokens, BE.output_tokens, context_tokens, rows)
    return tokens_per_s(machine, MODEL, ls, work)


def _ls_load(runs: Runs) -> LsLoad:
    """What `ls-only` did, mean over its runs."""
    mine = _ls_runs(runs)
    if not mine:
        return LsLoad(0.0, 0.0, 0.0)
    names = ("busy_share", "passes_per_s", "ls_tokens_per_pass")
    return LsLoad(*(_mean(mine, name) for name in names))


def _ls_runs(runs: Runs) -> Runs:
    """The runs of `ls-only` at the rate of its last one: the others belong to the bisection."""
    mine = [run for run in runs if run["policy"] == "ls-only"]
    return [run for run in mine if run["rate_per_s"] == mine[-1]["rate_per_s"]]


def _machine(runs: Runs) -> Machine:
    """What the machine could do before each of `runs`, on average."""
    return Machine(_mean(runs, "read_bytes_per_s"), _mean(runs, "matrix_flops"))


def _mean(runs: Runs, name: str) -> float:
    return float(np.mean([run[name] for run in runs]))


def _bootstrap(met: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """95 % interval of the mean, requests resampled."""
    rng = np.random.default_rng(0)
    means = rng.choice(met, (_RESAMPLES, len(met))).mean(axis=1)
    return [round(float(np.percentile(means, p)), 4) for p in (2.5, 97.5)]
