"""Each process of a whole deployment is killed under load and started again as it was.

That is what a container's restart policy does. Whoever it was, LS works again by itself, and every
item of a job is answered once, with the tokens of an undisturbed run.
"""

from __future__ import annotations

import collections
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from support.random_models import Kind
from support.random_models import make as make_random
from support.stack import ControlPlane, Stack, wait_for
from support.worker_stack import START_S, WorkerStack

from omniserve.client import Client, JobItem, OmniServeError, SamplingParams

MODEL = "SmolLM2-135M-Instruct"
ITEMS = 40
SAMPLING = SamplingParams(max_tokens=120, ignore_eos=True)
CONTROLPLANE = {"job_window_items": 8, "job_reclaim_s": 1.0, "job_renew_s": 0.2}


@dataclass
class Deployment:
    store: Stack
    workers: WorkerStack
    controlplane: ControlPlane
    client: Client

    def submit(self) -> str:
        prompts = [[500 + index, 7, 11, 13 + index] for index in range(ITEMS)]
        items = [
            JobItem(str(index), token_ids=prompt, sampling=SAMPLING)
            for index, prompt in enumerate(prompts)
        ]
        return self.client.submit_job(items)

    def results(self, job_id: str) -> dict[str, list[int]]:
        """Waits for the job's end; fails if an item is missing or has two results."""
        got = []
        while len(got) < ITEMS:  # its stream breaks with the control plane
            try:
                got += list(self.client.job_results(job_id, offset=len(got)))
            except OmniServeError:
                time.sleep(0.1)
        job = self.client.get_job(job_id)
        assert (job.counts.total, job.counts.completed, job.counts.failed) == (ITEMS, ITEMS, 0)
        names = collections.Counter(result.custom_id for result in got)
        assert names == {str(index): 1 for index in range(ITEMS)}
        return {result.custom_id: list(result.token_ids) for result in got}

    def completed(self, job_id: str) -> int:
        return self.client.get_job(job_id).counts.completed

    def answers(self) -> bool:
        """Whether an LS request is answered."""
        try:
            return bool(
                self.client.generate(
                    token_ids=[500, 7], model=MODEL, sampling=SamplingParams(max_tokens=4)
                ).text()
            )
        except OmniServeError:
            return False

    # --- who dies ----------------------------------------------------------------------

    def redis(self) -> None:
        self.store.kill_redis()
        self.store.start_redis()

    def attention_server(self) -> None:
        self.workers.servers[0].kill()
        self.workers.servers[0].restart()

    def worker(self) -> None:
        self.workers.worker.kill()
        self.workers.worker.restart()

    def engine(self) -> None:
        os.kill(self.workers.engine_pid(), signal.SIGKILL)
        assert self.workers.worker.process.wait(60) == 1
        self.workers.worker.restart()

    def control_plane(self) -> None:
        self.controlplane.kill()
        self.controlplane = self.store.controlplane(
            wait=False, listen=self.controlplane.address, **CONTROLPLANE
        )


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("restarts")
    make_random(Kind("small", "llama", {"vocab_size": 49_152})).save_pretrained(folder / "model")
    with Stack(folder) as store:
        flags = {"redis-url": store.redis_url, "model-path": folder / "model"}
        with WorkerStack(worker_flags=flags) as workers:
            controlplane = store.controlplane(**CONTROLPLANE)
            with Client(controlplane.address) as client:
                yield Deployment(store, workers, controlplane, client)


@pytest.fixture(scope="module")
def expected(deployment: Deployment) -> dict[str, list[int]]:
    """What the items are answered when nothing goes wrong."""
    return deployment.results(deployment.submit())


@pytest.mark.parametrize(
    "kill",
    [
        Deployment.redis,
        Deployment.attention_server,
        Deployment.worker,
        Deployment.engine,
        Deployment.control_plane,
    ],
    ids=lambda kill: kill.__name__,
)
def test_a_killed_process_that_is_started_again_costs_nothing_but_time(
    deployment: Deployment, expected: dict[str, list[int]], kill: Callable[[Deployment], None]
) -> None:
    job_id = deployment.submit()
    wait_for("some results", lambda: deployment.completed(job_id) > 1)
    assert deployment.completed(job_id) < ITEMS
    killed_s = time.monotonic()
    kill(deployment)
    wait_for("LS to work again", deployment.answers, START_S)
    print(f"LS worked again {time.monotonic() - killed_s:.1f} s after the kill")
    assert deployment.results(job_id) == expected
