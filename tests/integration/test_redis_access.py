"""Redis with a password and TLS: control plane and worker get in, or say why they cannot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from support.certificates import Certificate, self_signed
from support.stack import MODEL_PATH, Stack, wait_for
from support.tiny_model import TinyModel
from support.tls_proxy import TlsProxy
from support.worker_stack import WorkerStack

from omniserve import keys

PASSWORD = "p%40ss/word"  # not to be read as part of a URL


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with Stack(tmp_path) as stack:
        stack.redis.config_set("requirepass", PASSWORD)
        yield stack


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path)


@pytest.fixture
def flags(stack: Stack, certificate: Certificate, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """How a service reaches the Redis of `stack` through TLS."""
    password_file = tmp_path / "password"
    password_file.write_text(f"{PASSWORD}\n")
    with TlsProxy(certificate, stack.redis_port) as proxy:
        yield {
            "redis-url": f"rediss://localhost:{proxy.port}",
            "redis-password-file": password_file,
            "redis-ca-file": certificate.cert,
        }


def test_a_worker_and_a_control_plane_meet_there(
    stack: Stack, flags: dict[str, Any], tmp_path: Path
) -> None:
    admin = redis.Redis(port=stack.redis_port, password=PASSWORD)
    worker_flags = TinyModel(tmp_path).flags() | flags | {"advertise": "localhost:1"}
    with WorkerStack(servers=0, worker_flags=worker_flags):
        heartbeat = wait_for("a heartbeat", lambda: admin.get(keys.worker("w0")))
        assert b"localhost:1" in heartbeat
        stack.controlplane(model="SmolLM2-135M-Instruct", **flags)


def test_without_the_password_a_control_plane_is_up_but_not_ready(
    stack: Stack, flags: dict[str, Any]
) -> None:
    del flags["redis-password-file"]
    controlplane = stack.controlplane(wait=False, log_level="info", **flags)
    wait_for("its answer", controlplane.health)
    assert controlplane.health() == 2
    wait_for("the cause", lambda: "Authentication required" in controlplane.log_path.read_text())


@pytest.mark.parametrize("service", ["controlplane", "gpuworker"])
def test_what_cannot_be_used_is_refused_at_start(service: str, tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.touch()
    full.write_text("secret")
    for flags, named in (
        ([f"--redis-password-file={empty}"], f"{empty}: no password"),
        (["--redis-password-file=/none"], "/none"),
        (["--redis-url=redis://:p@h", f"--redis-password-file={full}"], "redis_password_file"),
        ([f"--redis-ca-file={full}"], "not rediss://"),
        (["--redis-url=rediss://h", "--redis-ca-file=/none"], "/none"),
        (["--redis-url=nonsense"], "redis_url: "),
    ):
        command = [sys.executable, "-m", f"omniserve.{service}", f"--model-path={MODEL_PATH}"]
        command += ["--listen=127.0.0.1:0", "--redis-url=redis://h", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2, done.stderr
        assert named in done.stderr
        assert "secret" not in done.stderr
