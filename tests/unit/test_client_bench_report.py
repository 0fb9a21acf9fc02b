"""report.json has the agreed shape, with counters as differences over the interval."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omniserve.client import (
    AttentionServerStatus,
    Limits,
    Status,
    Telemetry,
    TokensByPath,
    WorkerStatus,
)
from omniserve.client.bench.metrics import Outcome, RequestRecord
from omniserve.client.bench.plot import write_plot
from omniserve.client.bench.report import BacklogCounts, build_report, report_table
from omniserve.client.bench.samples import Sample
from omniserve.client.bench.settings import BenchSettings

SHAPE: dict[str, Any] = {
    "model": None, "device": None, "policy": None, "duration_s": None, "seed": None,
    "ls": {
        "requests": None, "completed": None, "refused": None, "failed": None,
        "slo": {"ttft_ms": None, "tpot_ms": None}, "attainment": None,
        "ttft_ms": {"p50": None, "p95": None, "p99": None},
        "tpot_ms": {"p50": None, "p95": None, "p99": None},
        "itl_ms": {"p99": None}, "output_tokens": None, "output_tokens_per_s": None,
    },
    "be": {
        "submitted": None, "completed": None, "failed": None, "output_tokens": None,
        "output_tokens_per_s": None,
        "tokens_by_path": {"device_resident": None, "boarded": None, "be_only": None},
    },
    "worker": {
        "passes": None, "boarded_rows": None, "be_only_rows": None,
        "mean_boarded_rows_per_stage": None, "ring_waits": None, "recomputed_tokens": None,
    },
    "attention_servers": [{"pid": None, "rows": None, "kv_bytes_read": None}],
}  # fmt: skip


def status(telemetry: Telemetry, servers: tuple[AttentionServerStatus, ...] = ()) -> Status:
    worker = WorkerStatus("w0", "smollm2", "cpu", "omniserve", telemetry, servers)
    return Status((worker,), 1.0, 0, Limits())


def server(pid: int, rows: int, kv_bytes_read: int) -> AttentionServerStatus:
    return AttentionServerStatus("a0", pid, rows, kv_bytes_read, 10, 10, 0)


START = status(
    Telemetry(passes=5, ls_stages=100, boarded_rows=50, be_output_tokens=10), (server(7, 10, 1000),)
)
END = status(
    Telemetry(
        passes=25,
        ls_stages=300,
        boarded_rows=450,
        be_output_tokens=110,
        be_tokens_by_path=TokensByPath(boarded=100),
    ),
    (server(7, 30, 5000),),
)


def report(records: list[RequestRecord], start: Status = START, end: Status = END) -> Any:
    counts = BacklogCounts(submitted=8, completed=3, failed=1)
    return build_report(BenchSettings(seed=3), records, 10.0, 10.0, counts, start, end)


def missing(shape: Any, value: Any) -> list[str]:
    """Returns the keys of `shape` that `value` lacks."""
    if isinstance(shape, dict):
        return [k for k in shape if k not in value] + [
            k for key, part in shape.items() if key in value for k in missing(part, value[key])
        ]
    return missing(shape[0], value[0]) if isinstance(shape, list) else []


def test_the_report_has_every_agreed_key() -> None:
    assert missing(SHAPE, report([])) == []


def test_counters_are_differences_over_the_interval() -> None:
    got = report([])
    assert got["worker"]["passes"] == 20
    assert got["worker"]["mean_boarded_rows_per_stage"] == 400 / 200
    assert got["be"]["output_tokens_per_s"] == 10.0
    assert got["be"]["tokens_by_path"] == {"device_resident": 0, "boarded": 100, "be_only": 0}
    assert got["attention_servers"] == [{"pid": 7, "rows": 20, "kv_bytes_read": 4000}]


def test_a_restarted_server_counts_from_zero() -> None:
    end = replace(END, workers=status(Telemetry(), (server(8, 12, 1200),)).workers)
    assert report([], end=end)["attention_servers"] == [
        {"pid": 8, "rows": 12, "kv_bytes_read": 1200}
    ]


def test_tokens_after_the_interval_do_not_count_as_its_output() -> None:
    record = RequestRecord(9.0, [9.5, 9.9, 10.5], Outcome.COMPLETED)
    assert report([record])["ls"]["output_tokens"] == 2


def test_table_and_plot_cope_with_a_run_without_requests(tmp_path: Any) -> None:
    assert report_table(report([])).row_count > 10
    path = tmp_path / "report.png"
    write_plot(path, BenchSettings(), [], [Sample(0.0, START)])
    assert path.read_bytes().startswith(b"\x89PNG")
