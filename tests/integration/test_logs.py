"""Logs as JSON lines: every line that a service writes can be parsed, also its last words."""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.stack import Stack, wait_for
from support.tiny_model import ARENA_BYTES, TinyModel
from support.worker_stack import WorkerStack

JSON = {"log-format": "json", "log-level": "debug"}


def entries(log: str) -> list[dict[str, str]]:
    found = [json.loads(line) for line in log.splitlines()]
    for entry in found:
        assert {"ts", "level", "logger", "message", "service"} <= entry.keys()
        when = datetime.datetime.fromisoformat(entry["ts"])
        assert when.utcoffset() == datetime.timedelta()
    return found


def test_a_control_plane_logs_json_lines(tmp_path: Path) -> None:
    with Stack(tmp_path) as stack:
        worker = stack.worker()
        controlplane = stack.controlplane(**JSON)
        worker.kill()
        wait_for("the loss", lambda: controlplane.health() == 2)
        controlplane.terminate()
        found = entries(controlplane.log_path.read_text())
    assert {entry["service"] for entry in found} == {"controlplane"}
    assert ("WARNING", "worker standin gone") in [(e["level"], e["message"]) for e in found]


def test_a_worker_and_its_servers_log_json_lines(tmp_path: Path) -> None:
    flags = TinyModel(tmp_path).flags() | JSON
    with WorkerStack(worker_flags=flags, server_flags=JSON, arena_bytes=ARENA_BYTES) as stack:
        worker = stack.worker
        logs = {service.log for service in stack.services}
        stack.worker.process.send_signal(signal.SIGTERM)
        worker.process.wait(60)
        found = {log.stem: entries(log.read_text()) for log in logs}
    assert {name: found[name][0]["service"] for name in found} == {
        "a0": "cpuattn",
        "a1": "cpuattn",
        "worker": "gpuworker",
    }


@pytest.mark.parametrize("service", ["controlplane", "gpuworker"])
def test_why_a_service_cannot_start_is_a_json_line_too(service: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"omniserve.{service}", "--log-format=json"]
    command += ["--listen=127.0.0.1:0", f"--model-path={tmp_path / 'none.gguf'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    last = entries(done.stderr)[-1]
    assert last["level"] == "CRITICAL"
    assert last["message"].startswith("MODEL_FILE: ")
