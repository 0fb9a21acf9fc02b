"""The SDK against a gRPC server of this process that answers deterministically."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from omniserve.client import (
    CallCancelledError,
    Chunk,
    Client,
    DeadlineExceededError,
    FinishReason,
    Job,
    JobCounts,
    JobItem,
    JobState,
    Message,
    MessageTooLargeError,
    SamplingParams,
    ServiceClass,
    Slo,
    UnreachableError,
    Usage,
)
from omniserve.errors import (
    ContextLengthExceededError,
    InvalidArgumentError,
    JobNotFoundError,
    SloUnattainableError,
)
from omniserve.rpc import SERVER_OPTIONS, abort, bind
from omniserve.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    types_pb2,
)


class Inference(inference_pb2_grpc.InferenceServiceServicer):  # type: ignore[misc]
    """Answers token ids 0, 1, 2... and hangs, refuses or fails on prompts that say so."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.cancelled = threading.Event()

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        self.requests.append(request)
        if request.text == "too long":
            abort(context, ContextLengthExceededError("9000 tokens", field="prompt"))
        if request.text == "busy":
            abort(context, SloUnattainableError("would miss", retry_after_s=1.5))
        for i in range(request.resume_offset, request.sampling.max_tokens):
            chunk = inference_pb2.Chunk(offset=i, token_ids=[i], text=f"{i} ")
            yield inference_pb2.GenerateResponse(request_id=request.request_id, chunk=chunk)
        reason = types_pb2.FINISH_REASON_LENGTH
        if request.text == "hang":
            self.cancelled.wait(30)
            reason = types_pb2.FINISH_REASON_CANCELLED
        usage = types_pb2.Usage(prompt_tokens=7, completion_tokens=request.sampling.max_tokens)
        usage.cached_tokens = 3
        finished = inference_pb2.Finished(reason=reason, usage=usage)
        yield inference_pb2.GenerateResponse(request_id=request.request_id, finished=finished)

    def Cancel(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        self.cancelled.set()
        known = any(r.request_id == request.request_id for r in self.requests)
        return inference_pb2.CancelResponse(cancelled=known)

    def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        model = inference_pb2.Model(id="m", context_tokens=8192, dtype="bfloat16", device="cpu")
        return inference_pb2.ListModelsResponse(models=[model])


class Jobs(jobs_pb2_grpc.JobServiceServicer):  # type: ignore[misc]
    """Completes every item at once with its own prompt."""

    def __init__(self) -> None:
        self.jobs: dict[str, Any] = {}

    def SubmitJob(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        self.jobs[request.job_id] = request
        return jobs_pb2.SubmitJobResponse(job_id=request.job_id)

    def GetJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        job = self.jobs.get(request.job_id)
        if job is None:
            abort(context, JobNotFoundError(f"no job {request.job_id!r}"))
        return jobs_pb2.GetJobResponse(
            job_id=request.job_id,
            state=jobs_pb2.JOB_STATE_COMPLETED,
            counts=jobs_pb2.JobCounts(total=len(job.items), completed=len(job.items)),
        )

    def StreamJobResults(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802, ARG002
        for item in self.jobs[request.job_id].items[request.offset :]:
            result = jobs_pb2.JobResult(
                custom_id=item.custom_id, reason=types_pb2.FINISH_REASON_STOP, text=item.text
            )
            yield jobs_pb2.StreamJobResultsResponse(result=result)


@pytest.fixture
def inference() -> Inference:
    return Inference()


@pytest.fixture
def client(inference: Inference) -> Iterator[Client]:
    server = grpc.server(ThreadPoolExecutor(8), options=SERVER_OPTIONS)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
    jobs_pb2_grpc.add_JobServiceServicer_to_server(Jobs(), server)
    port = bind(server, "127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as connected:
        yield connected
    inference.cancelled.set()
    server.stop(None).wait()


def test_a_generation_yields_chunks_and_ends_with_its_usage(client: Client) -> None:
    running = client.generate("hi", sampling=SamplingParams(max_tokens=2))
    assert running.usage is None
    assert list(running) == [Chunk(0, (0,), "0 "), Chunk(1, (1,), "1 ")]
    assert running.finish_reason is FinishReason.LENGTH
    assert running.usage == Usage(7, 2, 3)
    assert list(running) == []


def test_all_that_the_caller_says_reaches_the_server(client: Client, inference: Inference) -> None:
    client.generate(
        messages=[Message("user", "hi")],
        service_class="best_effort",
        sampling=SamplingParams(3, 0.5, 9, True, top_k=5, stop=["a", "b"], logprobs=2),
        slo=Slo(100, 20),
        request_id="r1",
        resume_offset=1,
    ).text()
    (request,) = inference.requests
    assert request.model == "m"
    assert request.chat.messages[0].content == "hi"
    assert request.service_class == types_pb2.SERVICE_CLASS_BEST_EFFORT
    assert request.sampling.ignore_eos
    assert request.sampling.top_k == 5
    assert list(request.sampling.stop) == ["a", "b"]
    assert request.sampling.logprobs == 2
    assert (request.request_id, request.resume_offset, request.slo.tpot_ms) == ("r1", 1, 20)


def test_a_single_stop_string_is_not_taken_for_a_list_of_characters(
    client: Client, inference: Inference
) -> None:
    client.generate("hi", sampling=SamplingParams(1, stop="end")).text()
    assert list(inference.requests[0].sampling.stop) == ["end"]


def test_cancelling_from_another_thread_ends_the_stream(client: Client) -> None:
    running = client.generate("hang", sampling=SamplingParams(max_tokens=1))
    assert next(running).token_ids == (0,)
    threading.Timer(0.1, running.cancel).start()
    assert list(running) == []
    assert running.finish_reason is FinishReason.CANCELLED


def test_leaving_the_with_block_cancels(client: Client, inference: Inference) -> None:
    with client.generate("hang", sampling=SamplingParams(max_tokens=1)) as running:
        next(running)
    assert inference.cancelled.wait(10)


def test_closing_the_client_ends_running_generations_with_a_typed_error(client: Client) -> None:
    running = client.generate("hang", sampling=SamplingParams(max_tokens=1))
    next(running)
    client.close()
    with pytest.raises(CallCancelledError):
        next(running)


def test_a_refusal_of_the_server_keeps_its_type_field_and_delay(client: Client) -> None:
    with pytest.raises(ContextLengthExceededError) as too_long:
        client.generate("too long").text()
    assert too_long.value.field == "prompt"
    with pytest.raises(SloUnattainableError) as busy:
        client.generate("busy").text()
    assert busy.value.retry_after_s == 1.5


@pytest.mark.parametrize("service_class", ["urgent", "", "LATENCY_SENSITIVE"])
def test_an_unknown_service_class_is_named(client: Client, service_class: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        client.generate("hi", service_class=service_class)
    assert error.value.field == "service_class"


def test_values_without_a_wire_form_are_named(client: Client) -> None:
    with pytest.raises(InvalidArgumentError) as sampling:
        client.generate("hi", sampling=SamplingParams(max_tokens=-1))
    assert sampling.value.field == "sampling"
    with pytest.raises(InvalidArgumentError) as ids:
        client.generate(token_ids=[-5])
    assert ids.value.field == "token_ids"
    with pytest.raises(InvalidArgumentError) as both:
        client.generate("hi", token_ids=[5])
    assert both.value.field == "prompt"


def test_a_message_over_the_size_limit_is_a_typed_error(client: Client) -> None:
    with pytest.raises(MessageTooLargeError):
        client.generate("x" * (5 << 20)).text()


def test_a_timeout_is_a_typed_error(client: Client) -> None:
    running = client.generate("hang", sampling=SamplingParams(max_tokens=1), timeout_s=0.3)
    with pytest.raises(DeadlineExceededError):
        running.text()
    assert running.finish_reason is FinishReason.ERROR


def test_no_server_is_a_typed_error() -> None:
    with Client("127.0.0.1:1") as nobody, pytest.raises(UnreachableError):
        nobody.models()


def test_one_client_serves_many_threads(client: Client) -> None:
    def run(n: int) -> str:
        return client.generate("hi", sampling=SamplingParams(max_tokens=n)).text()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(1, 17))) == [
            "".join(f"{i} " for i in range(n)) for n in range(1, 17)
        ]


def test_a_job_is_submitted_and_its_results_read_from_an_offset(client: Client) -> None:
    items = [JobItem(f"i{n}", prompt=f"p{n}") for n in range(3)]
    job_id = client.submit_job(items)
    assert client.get_job(job_id) == Job(job_id, JobState.COMPLETED, JobCounts(3, 3, 0))
    results = list(client.job_results(job_id, offset=1))
    assert [(r.custom_id, r.text, r.finish_reason) for r in results] == [
        ("i1", "p1", FinishReason.STOP),
        ("i2", "p2", FinishReason.STOP),
    ]


def test_an_unknown_job_is_a_typed_error(client: Client) -> None:
    with pytest.raises(JobNotFoundError):
        client.get_job("nobody")


def test_service_classes_may_be_given_as_enum(client: Client, inference: Inference) -> None:
    client.generate("hi", service_class=ServiceClass.BEST_EFFORT).text()
    assert inference.requests[0].service_class == types_pb2.SERVICE_CLASS_BEST_EFFORT
