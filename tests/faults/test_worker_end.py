"""How a worker's processes end, and what they leave behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import pytest
from support.prompts import real_prompts
from support.stack import Stack, wait_for
from support.tiny_model import TinyModel
from support.worker_stack import WorkerStack

from omniserve import keys


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


def test_a_worker_that_is_told_to_end_finishes_ls_and_hands_best_effort_back() -> None:
    with WorkerStack(servers=0, worker_flags={"drain-s": 120}) as stack:
        prompt = real_prompts()[1]
        best_effort = stack.start(prompt, 2000, best_effort=True, ignore_eos=True)
        best_effort.read(1)
        running = stack.start(prompt, 100, ignore_eos=True)
        running.read(1)
        stack.worker.process.send_signal(signal.SIGTERM)
        assert len(running.finish()) == 100
        with pytest.raises(grpc.RpcError):
            best_effort.finish()
        assert stack.worker.process.wait(60.0) == 0


def test_a_worker_that_is_told_to_end_sends_what_best_effort_tokens_have_gathered() -> None:
    with WorkerStack(servers=0, worker_flags={"drain-s": 120}) as stack:
        prompt = real_prompts()[1]
        options = {"best_effort": True, "ignore_eos": True, "stream_interval_ms": 3_600_000}
        best_effort = stack.start(prompt, 2000, **options)
        running = stack.start(prompt, 100, ignore_eos=True)
        stack.wait_until("best-effort tokens", lambda s: s.telemetry.be_output_tokens >= 5)
        stack.worker.process.send_signal(signal.SIGTERM)
        best_effort.read(5)
        running.finish()


def test_an_engine_that_makes_no_progress_is_not_serving_until_it_goes_on(tmp_path: Path) -> None:
    with Stack(tmp_path) as store:
        flags = TinyModel(tmp_path).flags() | {"redis-url": store.redis_url}
        with WorkerStack(servers=0, worker_flags=flags) as stack:
            key = keys.worker("w0")
            wait_for("a heartbeat", lambda: store.redis.exists(key))
            os.kill(stack.engine_pid(), signal.SIGSTOP)
            wait_for("health to notice", lambda: not stack.is_serving())
            wait_for("the heartbeat's end", lambda: not store.redis.exists(key))
            os.kill(stack.engine_pid(), signal.SIGCONT)
            wait_for("health", stack.is_serving)
            wait_for("a heartbeat", lambda: store.redis.exists(key))
