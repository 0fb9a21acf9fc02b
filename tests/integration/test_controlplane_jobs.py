"""Durable jobs against real control planes and Valkey; only the worker is a stand-in."""

from collections.abc import Iterator

import grpc
import pytest
from support.stack import MODEL_PATH, ControlPlane, Stack, wait_for
from support.standin_worker import REFUSED_TOKEN, STUCK_TOKEN, expected_tokens

from omniserve import keys
from omniserve.controlplane import tokenizer
from omniserve.errors import (
    ContextLengthExceededError,
    InvalidArgumentError,
    JobNotFoundError,
    ModelNotFoundError,
    OmniServeError,
    QueueFullError,
    RequestExistsError,
    from_rpc_error,
)
from omniserve.v1 import inference_pb2, jobs_pb2, status_pb2, types_pb2


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="module")
def controlplane(stack: Stack) -> ControlPlane:
    stack.worker()
    return stack.controlplane(job_queue_items_max=50, job_window_items=8)


def items(count: int, max_tokens: int = 4, first_token: int = 500) -> list[jobs_pb2.JobItem]:
    return [
        jobs_pb2.JobItem(
            custom_id=f"item-{index}",
            token_ids=types_pb2.TokenIds(ids=[first_token, index]),
            sampling=types_pb2.SamplingParams(max_tokens=max_tokens),
        )
        for index in range(count)
    ]


def submit(controlplane: ControlPlane, job: list[jobs_pb2.JobItem], job_id: str = "") -> str:
    request = jobs_pb2.SubmitJobRequest(job_id=job_id, items=job)
    return str(controlplane.jobs.SubmitJob(request).job_id)


def results(
    controlplane: ControlPlane, job_id: str, offset: int = 0, follow: bool = True
) -> list[jobs_pb2.JobResult]:
    request = jobs_pb2.StreamJobResultsRequest(job_id=job_id, offset=offset, follow=follow)
    return [response.result for response in controlplane.jobs.StreamJobResults(request)]


def get(controlplane: ControlPlane, job_id: str) -> jobs_pb2.GetJobResponse:
    response: jobs_pb2.GetJobResponse = controlplane.jobs.GetJob(
        jobs_pb2.GetJobRequest(job_id=job_id)
    )
    return response


def submit_error(
    controlplane: ControlPlane, job: list[jobs_pb2.JobItem], **fields: str
) -> OmniServeError:
    with pytest.raises(grpc.RpcError) as caught:
        controlplane.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(items=job, **fields))
    typed = from_rpc_error(caught.value)
    assert typed is not None
    return typed


def test_every_item_is_answered_once_with_its_own_tokens(controlplane: ControlPlane) -> None:
    job_id = submit(controlplane, items(30))
    answered = {result.custom_id: result for result in results(controlplane, job_id)}
    assert len(answered) == 30
    for index in range(30):
        result = answered[f"item-{index}"]
        assert list(result.token_ids) == expected_tokens([500, index], 4)
        assert result.text
        assert result.usage.completion_tokens == 4
    job = get(controlplane, job_id)
    assert job.state == jobs_pb2.JOB_STATE_COMPLETED
    assert (job.counts.total, job.counts.completed, job.counts.failed) == (30, 30, 0)
    assert len(results(controlplane, job_id, offset=25)) == 5
    assert results(controlplane, job_id, offset=30) == []


def test_a_jobs_tenant_reaches_the_worker_and_cached_tokens_come_back(
    controlplane: ControlPlane,
) -> None:
    request = jobs_pb2.SubmitJobRequest(items=items(2), tenant="a")
    job_id = controlplane.jobs.SubmitJob(request).job_id
    assert [r.usage.cached_tokens for r in results(controlplane, job_id)] == [1, 1]


def test_a_repeated_submission_changes_nothing(controlplane: ControlPlane) -> None:
    assert submit(controlplane, items(3), "mine") == "mine"
    assert len(results(controlplane, "mine")) == 3
    assert submit(controlplane, items(3), "mine") == "mine"
    assert len(results(controlplane, "mine")) == 3
    assert get(controlplane, "mine").counts.total == 3
    assert type(submit_error(controlplane, items(4), job_id="mine")) is RequestExistsError


def test_an_item_that_the_worker_refuses_fails_alone(controlplane: ControlPlane) -> None:
    job = [*items(2), jobs_pb2.JobItem(token_ids=types_pb2.TokenIds(ids=[REFUSED_TOKEN]))]
    job_id = submit(controlplane, job)
    failed = [result for result in results(controlplane, job_id) if result.error]
    assert [(r.custom_id, r.reason) for r in failed] == [("2", types_pb2.FINISH_REASON_ERROR)]
    counts = get(controlplane, job_id).counts
    assert (counts.completed, counts.failed) == (2, 1)


def test_stop_strings_and_logprobs_hold_for_items_too(controlplane: ControlPlane) -> None:
    words = tokenizer.load(MODEL_PATH)
    made = expected_tokens([500, 0], 100)
    text = words.decode(made[:20])
    stop = text[len(text) // 2 :][:6]
    sampling = types_pb2.SamplingParams(max_tokens=5000, stop=[stop], logprobs=1)
    job = items(1)
    job[0].sampling.CopyFrom(sampling)
    (result,) = results(controlplane, submit(controlplane, job))
    assert result.text == text[: text.find(stop)]
    assert result.reason == types_pb2.FINISH_REASON_STOP
    assert list(result.token_ids) == made[: result.usage.completion_tokens]
    assert [-entry.logprob for entry in result.logprobs] == list(range(len(result.token_ids)))


def test_workers_gather_the_tokens_of_items_unless_these_have_stop_strings(
    stack: Stack, controlplane: ControlPlane
) -> None:
    job = items(2)
    job[1].sampling.stop.append("never said")
    job_id = submit(controlplane, job)
    assert len(results(controlplane, job_id)) == 2
    logs = "".join(process.log_path.read_text() for process in stack.processes)
    assert f"{job_id}:0 every 10000 ms" in logs
    assert f"{job_id}:1 every 0 ms" in logs


def test_a_bad_item_refuses_the_job_and_is_named(controlplane: ControlPlane) -> None:
    good = items(3)
    error = submit_error(controlplane, [*good, jobs_pb2.JobItem(text="")])
    assert (type(error), error.field) == (InvalidArgumentError, "items[3].text")
    hot = jobs_pb2.JobItem(text="x", sampling=types_pb2.SamplingParams(temperature=-1))
    error = submit_error(controlplane, [hot])
    assert (type(error), error.field) == (InvalidArgumentError, "items[0].sampling.temperature")
    long = jobs_pb2.JobItem(text="x", sampling=types_pb2.SamplingParams(max_tokens=9000))
    error = submit_error(controlplane, [long])
    assert (type(error), error.field) == (
        ContextLengthExceededError,
        "items[0].sampling.max_tokens",
    )
    error = submit_error(controlplane, [good[0], good[0]])
    assert (type(error), error.field) == (InvalidArgumentError, "items[1].custom_id")
    error = submit_error(controlplane, [])
    assert (type(error), error.field) == (InvalidArgumentError, "items")
    error = submit_error(controlplane, good, job_id="no spaces")
    assert (type(error), error.field) == (InvalidArgumentError, "job_id")
    assert type(submit_error(controlplane, good, model="gpt-9")) is ModelNotFoundError


def test_an_unknown_job_is_not_found(controlplane: ControlPlane) -> None:
    for call in (
        lambda: get(controlplane, "nope"),
        lambda: results(controlplane, "nope"),
        lambda: controlplane.jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id="nope")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert type(from_rpc_error(caught.value)) is JobNotFoundError


def test_a_job_over_the_queue_bound_is_refused_whole(
    stack: Stack, controlplane: ControlPlane
) -> None:
    before = stack.redis.xlen(keys.BE_STREAM)
    error = submit_error(controlplane, items(51))
    assert type(error) is QueueFullError
    assert error.retry_after_s
    assert stack.redis.xlen(keys.BE_STREAM) == before


def test_cancelling_ends_queued_and_running_items(stack: Stack, controlplane: ControlPlane) -> None:
    job_id = submit(controlplane, items(20, first_token=STUCK_TOKEN))

    def running() -> int:
        status = controlplane.status.GetStatus(status_pb2.GetStatusRequest())
        return int(status.workers[0].telemetry.be_waiting)

    wait_for("a full window", lambda: running() == 8)
    assert results(controlplane, job_id, follow=False) == []
    counts = controlplane.jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id=job_id)).counts
    assert (counts.total, counts.completed, counts.failed) == (20, 0, 0)
    assert get(controlplane, job_id).state == jobs_pb2.JOB_STATE_CANCELLED
    assert results(controlplane, job_id) == []
    wait_for("nothing at the worker", lambda: running() == 0)
    assert stack.redis.xlen(keys.BE_STREAM) == 0
    # The window is free again, for jobs and for others.
    assert len(results(controlplane, submit(controlplane, items(10)))) == 10
    request = inference_pb2.GenerateRequest(
        text="hi", sampling=types_pb2.SamplingParams(max_tokens=2)
    )
    assert list(controlplane.inference.Generate(request))


def test_jobs_wait_for_a_worker(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Stack(tmp_path_factory.mktemp("waiting")) as own:
        controlplane = own.controlplane(wait=False)
        wait_for("an answer", lambda: controlplane.health() != 0)
        job_id = submit(controlplane, items(5))
        assert results(controlplane, job_id, follow=False) == []
        own.worker()
        assert len(results(controlplane, job_id)) == 5


def test_a_job_is_no_other_s_results_whatever_its_id(controlplane: ControlPlane) -> None:
    for job_id in ("plain:results", "plain:entries", "plain"):
        submit(controlplane, items(2), job_id)
        assert len(results(controlplane, job_id)) == 2
        assert get(controlplane, job_id).counts.completed == 2
