"""How a worker's processes end, and what they leave behind."""

from __future__ import annotations

import os
import signal

import grpc
import pytest
from support.prompts import real_prompts
from support.worker_stack import WorkerStack


def test_a_worker_and_its_servers_end_cleanly_in_mid_decode_and_leave_nothing() -> None:
    with WorkerStack(worker_flags={"be-placement": "host"}) as stack:
        stream = stack.start(real_prompts()[1], 8000, best_effort=True, ignore_eos=True)
        stream.read(4)
        engine = stack.engine_pid()
        assert stack.worker.terminate() == 0
        assert not os.path.exists(f"/proc/{engine}")
        assert [server.terminate() for server in stack.servers] == [0, 0]
        assert {path.suffix for path in stack.folder.iterdir()} == {".log"}


def test_a_worker_whose_engine_dies_ends_and_says_so() -> None:
    with WorkerStack(servers=0) as stack:
        stream = stack.start(real_prompts()[1], 8000, ignore_eos=True)
        stream.read(4)
        os.kill(stack.engine_pid(), signal.SIGKILL)
        with pytest.raises(grpc.RpcError):
            stream.finish()
        assert stack.worker.process.wait(60.0) == 1
        last = stack.worker.log.read_text().splitlines()[-1]
        assert last.startswith("omniserve-gpuworker: ")
        assert last.endswith("the engine ended with status -9")
