"""Generate against a real control plane and Valkey; only the worker is a stand-in."""

import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from support.stack import MODEL_PATH, ControlPlane, Process, Stack, wait_for
from support.standin_worker import REFUSED_TOKEN, STUCK_TOKEN, expected_tokens

from omniserve.controlplane import tokenizer
from omniserve.controlplane.tokenizer import Tokenizer
from omniserve.errors import (
    ContextLengthExceededError,
    InvalidArgumentError,
    ModelNotFoundError,
    NoWorkerError,
    OmniServeError,
    QueueFullError,
    RequestNotFoundError,
    SloUnattainableError,
    from_rpc_error,
)
from omniserve.v1 import inference_pb2, status_pb2, types_pb2

MODEL = "SmolLM2-135M-Instruct"
PROMPT = [100, 200, 300]
CHAT = types_pb2.Chat(messages=[types_pb2.ChatMessage(role="user", content="hi")])


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="module")
def controlplane(stack: Stack) -> ControlPlane:
    stack.worker()
    return stack.controlplane(be_generate_max=2)


def ask(**fields: object) -> inference_pb2.GenerateRequest:
    """A request of 8 tokens for PROMPT, unless `fields` say otherwise."""
    if not {"text", "chat", "token_ids"} & fields.keys():
        fields["token_ids"] = types_pb2.TokenIds(ids=PROMPT)
    fields.setdefault("sampling", types_pb2.SamplingParams(max_tokens=8))
    return inference_pb2.GenerateRequest(**fields)  # type: ignore[arg-type]


def tokens(responses: list[inference_pb2.GenerateResponse]) -> list[int]:
    return [i for response in responses for i in response.chunk.token_ids]


def error_of(controlplane: ControlPlane, request: inference_pb2.GenerateRequest) -> OmniServeError:
    with pytest.raises(grpc.RpcError) as caught:
        list(controlplane.inference.Generate(request))
    typed = from_rpc_error(caught.value)
    assert typed is not None
    return typed


def test_a_stream_has_every_token_once_and_ends_with_its_usage(controlplane: ControlPlane) -> None:
    responses = list(controlplane.inference.Generate(ask()))
    assert tokens(responses) == expected_tokens(PROMPT, 8)
    offsets = [r.chunk.offset for r in responses[:-1]]
    assert offsets == sorted(set(offsets))
    assert responses[0].request_id
    finished = responses[-1].finished
    assert finished.reason == types_pb2.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (3, 8)


@pytest.mark.parametrize(("tenant", "cached"), [("", 0), ("ab", 2), ("abcdef", 3)])
def test_a_tenant_reaches_the_worker_and_cached_tokens_of_the_prompt_come_back(
    controlplane: ControlPlane, tenant: str, cached: int
) -> None:
    *_, last = controlplane.inference.Generate(ask(tenant=tenant))
    assert last.finished.usage.cached_tokens == cached


@pytest.mark.parametrize("prompt", [{"text": "Hello there"}, {"chat": CHAT}])
def test_text_and_chat_prompts_get_text_back(
    controlplane: ControlPlane, prompt: dict[str, object]
) -> None:
    responses = list(controlplane.inference.Generate(ask(model=MODEL, **prompt)))
    assert len(tokens(responses)) == 8
    assert "".join(r.chunk.text for r in responses)


BAD_REQUESTS = [
    (ask(text=""), InvalidArgumentError, "text"),
    (inference_pb2.GenerateRequest(), InvalidArgumentError, "prompt"),
    (ask(chat=types_pb2.Chat()), InvalidArgumentError, "chat.messages"),
    (
        ask(chat=types_pb2.Chat(messages=[types_pb2.ChatMessage(role="pirate", content="arr")])),
        InvalidArgumentError,
        "chat.messages[0].role",
    ),
    (
        ask(chat=types_pb2.Chat(messages=[types_pb2.ChatMessage(role="user")])),
        InvalidArgumentError,
        "chat.messages[0].content",
    ),
    (ask(token_ids=types_pb2.TokenIds()), InvalidArgumentError, "token_ids.ids"),
    (ask(token_ids=types_pb2.TokenIds(ids=[1, 49_152])), InvalidArgumentError, "token_ids.ids[1]"),
    *(
        (
            ask(sampling=types_pb2.SamplingParams(temperature=value)),
            InvalidArgumentError,
            "sampling.temperature",
        )
        for value in (-0.1, 100.5, float("nan"), float("inf"))
    ),
    *(
        (ask(sampling=types_pb2.SamplingParams(**fields)), InvalidArgumentError, f"sampling.{name}")
        for fields, name in (
            ({"top_p": 1.1}, "top_p"),
            ({"min_p": -0.1}, "min_p"),
            ({"repetition_penalty": -1.0}, "repetition_penalty"),
            ({"presence_penalty": 3.0}, "presence_penalty"),
            ({"frequency_penalty": float("nan")}, "frequency_penalty"),
            ({"logprobs": 21}, "logprobs"),
            ({"stop": ["x", ""]}, "stop[1]"),
        )
    ),
    (
        ask(sampling=types_pb2.SamplingParams(max_tokens=8193)),
        ContextLengthExceededError,
        "sampling.max_tokens",
    ),
    (
        ask(sampling=types_pb2.SamplingParams(max_tokens=5999)),
        ContextLengthExceededError,
        "token_ids",
    ),
    (
        ask(sampling=types_pb2.SamplingParams(max_tokens=6001)),  # over an LS request's device KV
        ContextLengthExceededError,
        "sampling.max_tokens",
    ),
    (
        ask(text="word " * 3100, service_class=types_pb2.SERVICE_CLASS_BEST_EFFORT),
        ContextLengthExceededError,
        "text",
    ),
    (ask(text="word " * 8200), ContextLengthExceededError, "text"),
    (ask(text="w" * 1_000_000), ContextLengthExceededError, "text"),
    (ask(request_id="no spaces"), InvalidArgumentError, "request_id"),
    (ask(request_id="x" * 129), InvalidArgumentError, "request_id"),
    (ask(resume_offset=3), InvalidArgumentError, "request_id"),
    (ask(slo=types_pb2.Slo(ttft_ms=-1)), InvalidArgumentError, "slo.ttft_ms"),
    (ask(slo=types_pb2.Slo(tpot_ms=1e12)), InvalidArgumentError, "slo.tpot_ms"),
    (ask(service_class=9), InvalidArgumentError, "service_class"),
    (ask(model="gpt-9"), ModelNotFoundError, ""),
    (ask(request_id="never-seen", resume_offset=3), RequestNotFoundError, "request_id"),
    (
        ask(token_ids=types_pb2.TokenIds(ids=[REFUSED_TOKEN])),
        InvalidArgumentError,
        "token_ids.ids",
    ),
]


@pytest.mark.parametrize(
    ("request_", "kind", "field"),
    BAD_REQUESTS,
    ids=[f"{f}-{i}" for i, (_, _, f) in enumerate(BAD_REQUESTS)],
)
def test_a_bad_request_gets_a_typed_error_that_names_its_field(
    controlplane: ControlPlane,
    request_: inference_pb2.GenerateRequest,
    kind: type[OmniServeError],
    field: str,
) -> None:
    error = error_of(controlplane, request_)
    assert type(error) is kind
    assert error.field == field


def test_a_message_over_the_size_limit_is_refused_and_the_next_one_served(
    controlplane: ControlPlane,
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(controlplane.inference.Generate(ask(text="x" * 5_000_000)))
    assert caught.value.code().value[0] == code_pb2.RESOURCE_EXHAUSTED
    assert list(controlplane.inference.Generate(ask()))


def test_an_slo_that_cannot_be_met_is_refused_with_a_time_to_retry(
    controlplane: ControlPlane,
) -> None:
    error = error_of(controlplane, ask(slo=types_pb2.Slo(ttft_ms=0.5)))
    assert type(error) is SloUnattainableError
    assert error.retry_after_s
    assert error.metadata["predicted_ttft_ms"]


def test_best_effort_calls_in_flight_are_bounded(controlplane: ControlPlane) -> None:
    stuck = types_pb2.TokenIds(ids=[STUCK_TOKEN])
    request = ask(token_ids=stuck, service_class=types_pb2.SERVICE_CLASS_BEST_EFFORT)
    calls = [controlplane.inference.Generate(request) for _ in range(2)]
    try:
        refused = wait_for("a refusal", lambda: _refused(controlplane, request))
        assert type(refused) is QueueFullError
        assert list(controlplane.inference.Generate(ask()))  # LS goes on
    finally:
        for call in calls:
            call.cancel()
    best_effort = ask(service_class=types_pb2.SERVICE_CLASS_BEST_EFFORT)
    wait_for("room again", lambda: not _refused(controlplane, best_effort))


def _refused(
    controlplane: ControlPlane, request: inference_pb2.GenerateRequest
) -> OmniServeError | None:
    try:
        list(controlplane.inference.Generate(request, timeout=0.5))
    except grpc.RpcError as error:
        return from_rpc_error(error)
    return None


def test_an_explicit_cancel_ends_the_stream_as_cancelled(controlplane: ControlPlane) -> None:
    long = types_pb2.SamplingParams(max_tokens=5000)
    call = controlplane.inference.Generate(ask(request_id="to-cancel", sampling=long))
    next(call)
    cancel = inference_pb2.CancelRequest(request_id="to-cancel")
    assert controlplane.inference.Cancel(cancel).cancelled
    assert list(call)[-1].finished.reason == types_pb2.FINISH_REASON_CANCELLED
    assert not controlplane.inference.Cancel(cancel).cancelled
    unknown = inference_pb2.CancelRequest(request_id="unknown")
    assert not controlplane.inference.Cancel(unknown).cancelled


def test_a_broken_stream_is_resumed_through_another_control_plane(
    stack: Stack, controlplane: ControlPlane
) -> None:
    request = ask(request_id="resumed", sampling=types_pb2.SamplingParams(max_tokens=200))
    call = controlplane.inference.Generate(request)
    got = tokens([next(call), next(call), next(call)])
    call.cancel()
    other = stack.controlplane()
    request.resume_offset = len(got)
    rest = list(other.inference.Generate(request))
    assert rest[0].chunk.offset == len(got)
    assert got + tokens(rest) == expected_tokens(PROMPT, 200)
    assert rest[-1].finished.usage.completion_tokens == 200
    other.terminate()


def test_models_status_health_and_reflection_say_what_is_served(
    controlplane: ControlPlane,
) -> None:
    models = controlplane.inference.ListModels(inference_pb2.ListModelsRequest()).models
    assert [(m.id, m.context_tokens, m.dtype) for m in models] == [(MODEL, 8192, "float32")]
    status = controlplane.status.GetStatus(status_pb2.GetStatusRequest())
    assert [worker.worker_id for worker in status.workers] == ["standin"]
    services = ProtoReflectionDescriptorDatabase(controlplane.channel).get_services()
    public = [f"omniserve.v1.{name}Service" for name in ("Inference", "Job", "Status")]
    assert set(public) <= set(services)
    for service in public:
        assert controlplane.health(service) == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(controlplane.channel).Check(
            health_pb2.HealthCheckRequest(service="nope")
        )
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_attainment_counts_refused_requests_as_missed(
    stack: Stack, controlplane: ControlPlane
) -> None:
    for key in stack.redis.scan_iter("omniserve:ls:*"):
        stack.redis.delete(key)
    met = types_pb2.Slo(ttft_ms=60_000, tpot_ms=60_000)
    for _ in range(3):
        list(controlplane.inference.Generate(ask(slo=met)))
    error_of(controlplane, ask(slo=types_pb2.Slo(ttft_ms=0.5)))

    def counted() -> status_pb2.GetStatusResponse | None:
        status: status_pb2.GetStatusResponse = controlplane.status.GetStatus(
            status_pb2.GetStatusRequest()
        )
        return status if status.ls_window_requests == 4 else None

    assert wait_for("four requests in the window", counted).ls_attainment == 0.75


def test_limits_reach_the_worker_when_they_change(controlplane: ControlPlane) -> None:
    def same() -> bool:
        status = controlplane.status.GetStatus(status_pb2.GetStatusRequest())
        return str(status.workers[0].policy) == f"{status.limits.be_rows_per_stage} rows"

    wait_for("the worker to have the limits", same)


def test_a_stream_goes_on_when_its_worker_restarts(stack: Stack) -> None:
    with_own_redis = Stack(stack.folder / "restart")
    with_own_redis.folder.mkdir()
    with with_own_redis as own:
        worker = own.worker()
        controlplane = own.controlplane()
        got, restarted = _lose_worker_while_streaming(
            controlplane, worker, lambda: own.worker(listen=worker.address)
        )
        assert restarted
        assert got == expected_tokens(PROMPT, 300)
        long = types_pb2.SamplingParams(max_tokens=5000)
        call = controlplane.inference.Generate(ask(request_id="lost", sampling=long))
        next(call)
        for process in own.processes:
            if process is not controlplane:
                process.kill()
        cancel = inference_pb2.CancelRequest(request_id="lost")
        assert controlplane.inference.Cancel(cancel).cancelled
        assert list(call)[-1].finished.reason == types_pb2.FINISH_REASON_CANCELLED


def test_a_stream_moves_to_another_worker_and_ends_if_there_is_none(stack: Stack) -> None:
    with_own_redis = Stack(stack.folder / "move")
    with_own_redis.folder.mkdir()
    with with_own_redis as own:
        # Shown as busy, so that the request starts at the first one.
        first = own.worker(worker_id="a")
        second = own.worker(worker_id="b", decode_pass_ms=500)
        controlplane = own.controlplane(failover_s=0.5)
        wait_for("two workers", lambda: len(_workers(controlplane)) == 2)
        got, _ = _lose_worker_while_streaming(controlplane, first, lambda: second)
        assert got == expected_tokens(PROMPT, 300)
        request = ask(sampling=types_pb2.SamplingParams(max_tokens=2000))
        call = controlplane.inference.Generate(request)
        next(call)
        second.kill()
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert type(from_rpc_error(caught.value)) is NoWorkerError
        wait_for("no worker", lambda: not _workers(controlplane))
        assert type(error_of(controlplane, ask())) is NoWorkerError
        wait_for("unhealthy", lambda: controlplane.health() != 1)


def _workers(controlplane: ControlPlane) -> list[str]:
    status = controlplane.status.GetStatus(status_pb2.GetStatusRequest())
    return [worker.worker_id for worker in status.workers]


def _lose_worker_while_streaming(
    controlplane: ControlPlane, worker: Process, replace: object
) -> tuple[list[int], bool]:
    request = ask(sampling=types_pb2.SamplingParams(max_tokens=300, logprobs=1))
    call = controlplane.inference.Generate(request)
    responses = [next(call), next(call)]
    worker.kill()
    replaced = threading.Event()

    def bring_back() -> None:
        time.sleep(0.3)
        assert callable(replace)
        replace()
        replaced.set()

    threading.Thread(target=bring_back, daemon=True).start()
    responses += call
    # The stand-in tells thereby how much of the output it knows of.
    output = [-entry.logprob for response in responses for entry in response.chunk.logprobs]
    assert output == list(range(300))
    return tokens(responses), replaced.wait(10)


def test_a_repeated_id_gets_the_same_answer_and_a_job_s_id_is_refused(
    controlplane: ControlPlane,
) -> None:
    first = tokens(list(controlplane.inference.Generate(ask(request_id="twice"))))
    assert tokens(list(controlplane.inference.Generate(ask(request_id="twice")))) == first
    assert error_of(controlplane, ask(request_id="job:x:0")).field == "request_id"


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer.load(MODEL_PATH)


@pytest.mark.parametrize("service_class", [1, 2])
def test_a_stop_string_ends_the_text_before_it_and_the_request_at_its_worker(
    controlplane: ControlPlane, words: Tokenizer, service_class: int
) -> None:
    made = expected_tokens(PROMPT, 400)
    text = words.decode(made[:20])
    stop = text[len(text) // 2 :][:6]  # of several tokens, cut anywhere
    responses = list(
        controlplane.inference.Generate(
            ask(
                request_id=f"stopped-{service_class}",
                service_class=service_class,
                sampling=types_pb2.SamplingParams(max_tokens=5000, stop=["never there", stop]),
            )
        )
    )
    assert "".join(r.chunk.text for r in responses) == text[: text.find(stop)]
    finished = responses[-1].finished
    assert finished.reason == types_pb2.FINISH_REASON_STOP
    assert tokens(responses) == made[: finished.usage.completion_tokens]
    assert stop in words.decode(tokens(responses))
    cancel = inference_pb2.CancelRequest(request_id=f"stopped-{service_class}")
    assert not controlplane.inference.Cancel(cancel).cancelled  # it has ended at the worker


def test_stop_strings_that_do_not_come_change_nothing(
    controlplane: ControlPlane, words: Tokenizer
) -> None:
    made = expected_tokens(PROMPT, 50)
    ending = words.decode(made)[-1]  # held back until the end
    sampling = types_pb2.SamplingParams(max_tokens=50, stop=[ending + "no such end"])
    responses = list(controlplane.inference.Generate(ask(sampling=sampling)))
    assert tokens(responses) == made
    assert "".join(r.chunk.text for r in responses) == words.decode(made)
    assert responses[-1].finished.reason == types_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("stop", [[], ["e", "qqq"]])
def test_every_token_of_a_chunk_has_its_logprobs(
    controlplane: ControlPlane, stop: list[str]
) -> None:
    sampling = types_pb2.SamplingParams(max_tokens=60, logprobs=1, stop=stop)
    responses = list(controlplane.inference.Generate(ask(sampling=sampling)))
    chunks = [r.chunk for r in responses[:-1]]
    for chunk in chunks:
        assert len(chunk.logprobs) == len(chunk.token_ids)
    found = [-entry.logprob for chunk in chunks for entry in chunk.logprobs]
    assert found == list(range(responses[-1].finished.usage.completion_tokens))
