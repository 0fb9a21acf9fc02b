"""The report of a run: the dictionary behind report.json, and its table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from omniserve.client import Status
from omniserve.client.bench import metrics, samples
from omniserve.client.bench.metrics import Outcome, RequestRecord
from omniserve.client.bench.settings import BenchSettings


@dataclass(frozen=True)
class BacklogCounts:
    """Best-effort items of a run."""

    submitted: int
    """Accepted by the control plane."""
    completed: int
    """Ended with a result by the end of the interval."""
    failed: int
    """Ended with an error by then."""


def build_report(
    settings: BenchSettings,
    records: Sequence[RequestRecord],
    end_s: float,
    duration_s: float,
    backlog: BacklogCounts,
    start: Status,
    end: Status,
) -> dict[str, Any]:
    """Returns the content of report.json.

    `end_s`, on the clock of the records, ended an interval of `duration_s`. Rates and counters
    are of the interval; latencies are of all requests sent in it, wherever they ended. A
    percentile without values is None.
    """
    worker = end.workers[0] if end.workers else None
    return {
        "model": worker.model if worker else "",
        "device": worker.device if worker else "",
        "policy": worker.policy if worker else "",
        "duration_s": duration_s,
        "seed": settings.seed,
        "ls": _ls(settings, records, end_s, duration_s),
        "be": _be(backlog, duration_s, start, end),
        "worker": _worker(start, end),
        "attention_servers": samples.server_growth(start, end),
        "settings": settings.model_dump(),
    }


def _ls(
    settings: BenchSettings, records: Sequence[RequestRecord], end_s: float, duration_s: float
) -> dict[str, Any]:
    outcomes = Counter(r.outcome for r in records)
    tokens = sum(t <= end_s for r in records for t in r.token_times_s)
    return {
        "requests": len(records),
        "completed": outcomes[Outcome.COMPLETED],
        "refused": outcomes[Outcome.REFUSED],
        "failed": outcomes[Outcome.FAILED],
        "unfinished": outcomes[Outcome.UNFINISHED],
        "slo": {"ttft_ms": settings.slo_ttft_ms, "tpot_ms": settings.slo_tpot_ms},
        "attainment": metrics.attainment(records, settings.slo_ttft_ms, settings.slo_tpot_ms),
        "ttft_ms": _percentiles(metrics.ttfts_ms(records)),
        "tpot_ms": _percentiles(metrics.tpots_ms(records)),
        "itl_ms": {"p99": metrics.percentile([t for r in records for t in r.itl_ms()], 99)},
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / duration_s,
    }


def _be(backlog: BacklogCounts, duration_s: float, start: Status, end: Status) -> dict[str, Any]:
    tokens = samples.growth(start, end, "be_output_tokens")
    return {
        "submitted": backlog.submitted,
        "completed": backlog.completed,
        "failed": backlog.failed,
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / duration_s,
        "tokens_by_path": samples.be_tokens(start, end),
    }


def _worker(start: Status, end: Status) -> dict[str, Any]:
    boarded_rows = samples.growth(start, end, "boarded_rows")
    ls_stages = samples.growth(start, end, "ls_stages")
    return {
        "passes": samples.growth(start, end, "passes"),
        "ls_stages": ls_stages,
        "boarded_rows": boarded_rows,
        "be_only_rows": samples.growth(start, end, "be_only_rows"),
        "mean_boarded_rows_per_stage": boarded_rows / ls_stages if ls_stages else 0.0,
        "ring_waits": samples.growth(start, end, "ring_waits"),
        "recomputed_tokens": samples.growth(start, end, "recomputed_tokens"),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{p}": metrics.percentile(values, p) for p in (50, 95, 99)}


def report_table(report: dict[str, Any]) -> Table:
    """Returns the report as a table of one figure a row."""
    ls, be, worker = report["ls"], report["be"], report["worker"]
    slo = ls["slo"]
    table = Table(title=f"{report['model']} on {report['device']}, policy {report['policy']}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    rows = {
        "duration": f"{report['duration_s']:.1f} s",
        f"LS attainment (TTFT {slo['ttft_ms']:g} ms, TPOT {slo['tpot_ms']:g} ms)": number(
            ls["attainment"], ".3f"
        ),
        "LS completed / refused / failed / unfinished": " / ".join(
            str(ls[k]) for k in ("completed", "refused", "failed", "unfinished")
        ),
        "LS TTFT p50 / p95 / p99, ms": _triple(ls["ttft_ms"]),
        "LS TPOT p50 / p95 / p99, ms": _triple(ls["tpot_ms"]),
        "LS ITL p99, ms": number(ls["itl_ms"]["p99"]),
        "LS tokens/s": number(ls["output_tokens_per_s"]),
        "BE items: submitted / completed / failed": " / ".join(
            str(be[k]) for k in ("submitted", "completed", "failed")
        ),
        "BE tokens/s": number(be["output_tokens_per_s"]),
        "BE tokens: device / boarded / BE-only": " / ".join(
            str(be["tokens_by_path"][p]) for p in samples.BE_PATHS
        ),
        "rows boarded beside LS / in BE-only stages": (
            f"{worker['boarded_rows']} / {worker['be_only_rows']}"
        ),
        "boarded rows per LS stage": number(worker["mean_boarded_rows_per_stage"], ".2f"),
        "ring waits / recomputed tokens": f"{worker['ring_waits']} / {worker['recomputed_tokens']}",
    }
    # By place: in containers all have the same pid.
    for index, server in enumerate(report["attention_servers"]):
        rows[f"attention server {index}: rows, KV read"] = (
            f"{server['rows']}, {server['kv_bytes_read'] / 1e6:.0f} MB"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def number(value: float | None, form: str = ".1f") -> str:
    """Formats a figure that may have no value."""
    return "-" if value is None else format(value, form)


def _triple(percentiles: dict[str, float | None]) -> str:
    return " / ".join(number(percentiles[p]) for p in ("p50", "p95", "p99"))
