"""Sampling through a real worker: the tokens of a textbook sampler on `transformers`' logits, on
every path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support.random_models import KINDS, make
from support.sampling_reference import nearly_tied, next_token
from support.stack import wait_for
from support.worker_stack import Stream, WorkerStack

from omniserve.gpuworker.sampling_params import SamplingParams
from omniserve.internal.v1 import worker_pb2

KIND = next(kind for kind in KINDS if kind.name == "qwen2")
MAX_TOKENS = 64
NEARLY = 1e-4
CONTEXT_TOKENS = 128
PROMPT = [11, 7, 300, 42, 7, 9]
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8, "seed": 1},
    "top-k": {"temperature": 1.5, "seed": 2, "top_k": 5},
    "top-p": {"temperature": 1.5, "seed": 3, "top_p": 0.7},
    "min-p": {"temperature": 1.5, "seed": 4, "min_p": 0.2},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.0},
    "all": {
        "temperature": 1.2,
        "seed": 2**63 + 5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
    },
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make(KIND)


@pytest.fixture(scope="module")
def stack(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerStack]:
    folder: Path = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    flags = {"model-path": folder, "be-placement": "host", "context-tokens-max": CONTEXT_TOKENS}
    with WorkerStack(servers=1, worker_flags=flags) as stack:
        yield stack


def test_a_context_may_be_cut_short(stack: WorkerStack) -> None:
    report = stack.stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest())
    assert report.context_tokens == report.ls_tokens_max == CONTEXT_TOKENS
    with pytest.raises(grpc.RpcError, match="exceed 128 tokens"):
        stack.generate(PROMPT, CONTEXT_TOKENS)


def logits_behind(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens]), logits_to_keep=1).logits[0, -1]
    return logits


def test_every_option_yields_the_textbook_s_tokens_for_both_classes_in_one_batch(
    stack: WorkerStack, model: Any
) -> None:
    streams = [
        stack.start(PROMPT, MAX_TOKENS, best_effort=be, ignore_eos=True, **fields)
        for be in (False, True)
        for fields in OPTIONS.values()
    ]
    outputs = [stream.finish() for stream in streams]
    latency_sensitive, best_effort = outputs[: len(OPTIONS)], outputs[len(OPTIONS) :]
    assert latency_sensitive == best_effort
    assert len({tuple(output) for output in outputs}) == len(OPTIONS)
    for fields, output in zip(OPTIONS.values(), latency_sensitive, strict=True):
        params = SamplingParams(**fields)
        for index, token in enumerate(output):
            before = output[:index]
            logits = logits_behind(model, [*PROMPT, *before])
            if token != next_token(logits, PROMPT, before, params):
                assert token in nearly_tied(logits, PROMPT, before, params, NEARLY), (fields, index)


@pytest.mark.parametrize("name", ["frequency", "all"])
def test_a_request_goes_on_elsewhere_as_it_would_have_here(stack: WorkerStack, name: str) -> None:
    options = {"ignore_eos": True} | OPTIONS[name]
    whole = stack.generate(PROMPT, MAX_TOKENS, **options)
    for done in (1, 10, MAX_TOKENS - 1):
        prompt = PROMPT + whole[:done]
        rest = stack.generate(prompt, MAX_TOKENS - done, generated_tokens=done, **options)
        assert rest == whole[done:]


@pytest.mark.parametrize("best_effort", [False, True])
def test_logprobs_are_the_model_s_own_one_per_token(
    stack: WorkerStack, model: Any, best_effort: bool
) -> None:
    plain = stack.start(PROMPT, MAX_TOKENS, ignore_eos=True)
    options = {"ignore_eos": True, "logprobs": 4} | OPTIONS["all"]
    stream = stack.start(PROMPT, MAX_TOKENS, best_effort=best_effort, **options)
    tokens = stream.finish()
    plain.finish()
    assert plain.logprobs == []
    assert len(stream.logprobs) == len(tokens) == MAX_TOKENS
    for index, found in enumerate(stream.logprobs):
        logits = logits_behind(model, PROMPT + tokens[:index])
        wanted = torch.log_softmax(logits.double(), dim=-1)
        best = wanted.topk(4)
        assert found.logprob == pytest.approx(float(wanted[tokens[index]]), abs=1e-3)
        assert [top.token_id for top in found.top] == best.indices.tolist()
        assert [top.logprob for top in found.top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_a_stream_that_resumes_gets_the_logprobs_of_its_own_tokens(stack: WorkerStack) -> None:
    options: dict[str, Any] = {"ignore_eos": True, "logprobs": 1}

    def first_and_resumed() -> tuple[Stream, Stream] | None:
        first = stack.start(PROMPT, 100, **options)
        first.read(10)
        assert len(first.logprobs) == len(first.tokens)
        second = stack.rest(first, PROMPT, 100, **options)
        first.finish()
        return (first, second) if second is not None else None

    first, second = wait_for("a stream that is resumed in time", first_and_resumed)
    assert len(second.logprobs) == len(second.tokens)
    assert first.logprobs[100 - len(second.tokens) :] == second.logprobs
