"""What the servers have not acknowledged is known, and given up on the device only for LS."""

from __future__ import annotations

import signal
from pathlib import Path

from support.tiny_model import ARENA_BYTES, VOCABULARY, TinyModel
from support.worker_stack import WorkerStack

from omniserve.v1 import types_pb2

PROMPT = [3 + 7 * i % (VOCABULARY - 3) for i in range(300)]


def test_kv_that_a_stopped_server_does_not_take_lags_and_stays_on_the_device(
    tmp_path: Path,
) -> None:
    model = TinyModel(tmp_path)
    flags = model.flags() | {"be-placement": "host"}  # it is to leave the device as soon as it may
    with WorkerStack(worker_flags=flags, arena_bytes=ARENA_BYTES) as stack:
        stack.signal_servers(signal.SIGSTOP)
        stream = stack.start(PROMPT, 60, best_effort=True, ignore_eos=True)
        stack.wait_until("a lag", lambda s: s.telemetry.kv_checkpoint_lag_tokens >= len(PROMPT))
        telemetry = stack.telemetry()
        assert (telemetry.be_device_resident, telemetry.demotions) == (1, 0)
        stack.signal_servers(signal.SIGCONT)
        assert model.is_greedy(PROMPT, stream.finish())
        stack.wait_until("no lag", lambda s: s.telemetry.kv_checkpoint_lag_tokens == 0)
        assert stack.telemetry().demotions == 1


def test_ls_gets_the_memory_of_best_effort_whose_server_has_stopped(tmp_path: Path) -> None:
    model = TinyModel(tmp_path)
    flags = model.flags() | {"device-kv-tokens": 1024}
    with WorkerStack(worker_flags=flags, arena_bytes=ARENA_BYTES) as stack:
        stack.signal_servers(signal.SIGSTOP)
        batch = stack.start(PROMPT, 600, best_effort=True, ignore_eos=True)
        batch.read(200)  # then it has all of its share of the device, and no way to leave
        chat = stack.start([7] * 800, 40, ignore_eos=True)
        assert len(chat.finish()) == 40
        stack.signal_servers(signal.SIGCONT)
        assert model.is_greedy(PROMPT, batch.finish())
        assert stack.telemetry().recomputed_tokens > 0


def test_what_has_grown_too_long_to_start_over_ends_and_holds_up_nobody(tmp_path: Path) -> None:
    model = TinyModel(tmp_path)
    flags = model.flags() | {"device-kv-tokens": 1024}
    with WorkerStack(servers=1, worker_flags=flags, arena_bytes=ARENA_BYTES) as stack:
        long = stack.start(PROMPT, 1700, best_effort=True, ignore_eos=True)
        long.read(800)  # with its prompt it has more tokens than the device
        server = stack.servers[0]
        server.kill()
        next(stack.folder.glob("*.arena")).unlink()
        server.restart()
        long.finish()
        assert long.finish_reason == types_pb2.FINISH_REASON_CANCELLED
        short = stack.start(PROMPT, 20, best_effort=True, ignore_eos=True).finish()
        assert model.is_greedy(PROMPT, short)
