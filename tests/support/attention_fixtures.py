"""Fixtures of tests on a real attention server, a plugin of the test modules that name it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.attention_process import ServerProcess, Worker


@pytest.fixture
def shm_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="omniserve-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def server(shm_dir: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(shm_dir)
    yield process
    process.close()


@pytest.fixture
def worker(server: ServerProcess) -> Iterator[Worker]:
    worker = Worker(server)
    yield worker
    worker.link.check_integrity()
    assert worker.link.ring_waits == 0
    assert "integrity" not in server.log.read_text()
