"""SIGKILL of either side of a segment in mid-traffic, many times, at random moments."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from support.attention_process import PAGES, PATIENCE_S, ServerProcess
from support.attention_traffic import TrafficProcess

pytest_plugins = ["support.attention_fixtures"]

KILLS = 200
SEED = 20260121


def wait_for_answers(traffic: TrafficProcess, more: int) -> None:
    """Returns when the worker has checked `more` answers from now on."""
    goal = traffic.answered + more
    deadline = time.monotonic() + PATIENCE_S
    while traffic.answered < goal:
        assert traffic.process.is_alive(), "the worker found something wrong; see stderr"
        assert time.monotonic() < deadline, "no more answers"
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_kills_lose_no_message_and_mix_no_epochs(
    server: ServerProcess, shm_dir: Path
) -> None:
    rng = np.random.default_rng(SEED)
    killed = {"server": 0, "worker": 0}
    in_traffic = 0
    segments = {server.attach(epoch=1).segment_id}
    traffic = TrafficProcess(shm_dir, seed=1)
    for number in range(KILLS):
        # The worker checks each answer, so this is a check of every kill before.
        wait_for_answers(traffic, 20)
        time.sleep(float(rng.uniform(0, 0.02)))
        in_traffic += traffic.outstanding > 0
        if rng.random() < 0.5:
            killed["server"] += 1
            kill_server(server, rng)
            assert "adopted segment" in server.log.read_text()
            assert server.attach(epoch=killed["worker"] + 1).segment_id in segments
        else:
            killed["worker"] += 1
            traffic.kill()
            assert traffic.process.exitcode == -9, "the worker found something wrong; see stderr"
            # At once, while the server may be in the middle of what the dead one asked for.
            attached = server.attach(epoch=killed["worker"] + 1)
            assert attached.segment_id not in segments
            segments.add(attached.segment_id)
            traffic = TrafficProcess(shm_dir, seed=number + 2)
    assert traffic.finish() == 0
    assert server.stats().pages_free == PAGES
    assert server.stats().errors == 0
    assert min(killed.values()) > KILLS // 3
    assert in_traffic > KILLS * 0.8


def kill_server(server: ServerProcess, rng: np.random.Generator) -> None:
    """Kills and restarts it; sometimes kills it again at a random moment of its start."""
    server.kill()
    while rng.random() < 0.15:
        server.start_and_kill(float(rng.uniform(0.1, 1.5)))
    server.start()
