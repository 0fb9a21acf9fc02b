"""What is killed, and what must still be true afterwards."""

import collections
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.stack import MODEL_PATH, ControlPlane, Stack, wait_for
from support.standin_worker import expected_tokens

from omniserve import keys
from omniserve.errors import StoreUnavailableError, from_rpc_error
from omniserve.v1 import inference_pb2, jobs_pb2, status_pb2, types_pb2

ITEMS = 60
ITEM_TOKENS = 40
# Small enough that the queue is still full when something dies.
FLAGS: dict[str, Any] = {"job_window_items": 8, "job_reclaim_s": 1.0, "job_renew_s": 0.2}


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with Stack(tmp_path) as stack:
        yield stack


def submit(controlplane: ControlPlane) -> str:
    items = [
        jobs_pb2.JobItem(
            token_ids=types_pb2.TokenIds(ids=[500, index]),
            sampling=types_pb2.SamplingParams(max_tokens=ITEM_TOKENS),
        )
        for index in range(ITEMS)
    ]
    return str(controlplane.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(items=items)).job_id)


def completed(controlplane: ControlPlane, job_id: str) -> int:
    try:
        job = controlplane.jobs.GetJob(jobs_pb2.GetJobRequest(job_id=job_id))
    except grpc.RpcError:
        return 0
    return int(job.counts.completed)


def assert_answered_exactly_once(controlplane: ControlPlane, job_id: str) -> None:
    request = jobs_pb2.StreamJobResultsRequest(job_id=job_id, follow=True)
    got = [r.result for r in controlplane.jobs.StreamJobResults(request)]
    assert collections.Counter(r.custom_id for r in got) == {str(i): 1 for i in range(ITEMS)}
    for result in got:
        expected = expected_tokens([500, int(result.custom_id)], ITEM_TOKENS)
        assert list(result.token_ids) == expected
    job = controlplane.jobs.GetJob(jobs_pb2.GetJobRequest(job_id=job_id))
    assert (job.counts.total, job.counts.completed) == (ITEMS, ITEMS)
    assert job.state == jobs_pb2.JOB_STATE_COMPLETED


def test_a_killed_control_plane_s_items_are_answered_exactly_once_after_its_restart(
    stack: Stack,
) -> None:
    stack.worker()
    first = stack.controlplane(**FLAGS)
    job_id = submit(first)
    wait_for("some results", lambda: completed(first, job_id) > 5)
    first.kill()
    second = stack.controlplane(**FLAGS)
    assert_answered_exactly_once(second, job_id)
    assert stack.redis.xlen(keys.BE_STREAM) == 0
    assert stack.redis.xpending(keys.BE_STREAM, keys.BE_GROUP)["pending"] == 0


def test_of_two_control_planes_one_takes_over_what_the_other_leaves(stack: Stack) -> None:
    stack.worker()
    first, second = stack.controlplane(**FLAGS), stack.controlplane(**FLAGS)
    job_id = submit(first)
    wait_for("some results", lambda: completed(second, job_id) > 5)
    assert first.terminate() == 0
    assert_answered_exactly_once(second, job_id)


def test_items_of_a_killed_worker_are_run_again(stack: Stack) -> None:
    worker = stack.worker()
    controlplane = stack.controlplane(**FLAGS)
    job_id = submit(controlplane)
    wait_for("some results", lambda: completed(controlplane, job_id) > 5)
    worker.kill()
    stack.worker(listen=worker.address)
    assert_answered_exactly_once(controlplane, job_id)


def test_items_that_have_grown_too_long_to_move_start_over(stack: Stack) -> None:
    worker = stack.worker(prompt_tokens_max=2)
    controlplane = stack.controlplane(**FLAGS)
    job_id = submit(controlplane)
    wait_for("some results", lambda: completed(controlplane, job_id) > 5)
    worker.kill()
    stack.worker(listen=worker.address, prompt_tokens_max=2)
    assert_answered_exactly_once(controlplane, job_id)


def test_without_redis_ls_goes_on_and_jobs_are_unavailable_until_it_is_back(
    stack: Stack,
) -> None:
    stack.worker()
    controlplane = stack.controlplane(**FLAGS)
    job_id = submit(controlplane)
    wait_for("some results", lambda: completed(controlplane, job_id) > 5)
    stack.stop_redis()
    request = inference_pb2.GenerateRequest(
        request_id="without-redis", text="hi", sampling=types_pb2.SamplingParams(max_tokens=4)
    )
    wait_for("health to notice", lambda: controlplane.health() != 1)
    responses = list(controlplane.inference.Generate(request))
    assert responses[-1].finished.reason == types_pb2.FINISH_REASON_LENGTH
    assert controlplane.status.GetStatus(status_pb2.GetStatusRequest()).limits.ls_running_max
    with pytest.raises(grpc.RpcError) as caught:
        submit(controlplane)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    error = from_rpc_error(caught.value)
    assert type(error) is StoreUnavailableError
    assert error.retry_after_s
    stack.start_redis()
    stack.wait_serving(controlplane)
    assert_answered_exactly_once(controlplane, job_id)


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["--model-path=none.gguf"], 1, "controlplane: MODEL_FILE: none.gguf: No such file"),
        (["--slo-target=2"], 2, "controlplane: SETTINGS: slo_target: "),
        (["--nonsense=2"], 2, "controlplane: SETTINGS: "),
        (["--redis-url=nonsense"], 2, "controlplane: SETTINGS: redis_url: "),
    ],
)
def test_a_process_that_cannot_start_says_why_in_one_line(
    arguments: list[str], status: int, line: str
) -> None:
    defaults = ["--listen=127.0.0.1:0", f"--model-path={MODEL_PATH}"]
    command = [sys.executable, "-m", "omniserve.controlplane", *defaults, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_a_typed_error(stack: Stack) -> None:
    stack.worker()
    controlplane = stack.controlplane()
    flags = [f"--listen={controlplane.address}", f"--model-path={MODEL_PATH}"]
    flags.append(f"--redis-url={stack.redis_url}")
    command = [sys.executable, "-m", "omniserve.controlplane", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "controlplane: ADDRESS_IN_USE: cannot listen on" in done.stderr


def test_limits_are_decided_by_one_control_plane_and_another_goes_on_when_it_dies(
    stack: Stack,
) -> None:
    def holder_that_stays() -> bytes | None:
        seen = set()
        for _ in range(20):
            seen.add(stack.redis.get(keys.LIMITS_LOCK))
            time.sleep(0.1)
        return seen.pop() if len(seen) == 1 else None

    stack.worker()
    first = stack.controlplane()
    begun = wait_for("a holder of the lock", holder_that_stays)
    second = stack.controlplane()
    holder = wait_for("a holder of the lock", holder_that_stays)
    if holder != begun:  # a busy machine kept the first from it for longer than it lasts
        first, second = second, first

    def rows(controlplane: ControlPlane) -> int:
        """Limits, with an LS request that met its SLO as a reason to raise them."""
        sampling = types_pb2.SamplingParams(max_tokens=1)
        list(
            controlplane.inference.Generate(
                inference_pb2.GenerateRequest(text="hi", sampling=sampling)
            )
        )
        status = controlplane.status.GetStatus(status_pb2.GetStatusRequest())
        return int(status.limits.be_rows_per_stage)

    reached = wait_for("limits that grew", lambda: rows(first) > 18 and rows(first))
    wait_for("the other to follow", lambda: rows(second) >= reached)
    first.kill()
    taken = wait_for(
        "another holder",
        lambda: stack.redis.get(keys.LIMITS_LOCK) not in (None, holder),
    )
    assert taken
    wait_for("limits that go on growing from there", lambda: rows(second) > reached)
