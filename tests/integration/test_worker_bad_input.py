"""Bad input to a worker: a typed error that names the field or the cause, and nothing else lost."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from support.stack import MODEL_PATH
from support.worker_stack import WorkerStack
from transformers import LlamaConfig

from omniserve.internal.v1 import worker_pb2
from omniserve.v1 import status_pb2


@pytest.fixture(scope="module")
def stack() -> Iterator[WorkerStack]:
    with WorkerStack(servers=0, worker_flags={"device-kv-tokens": 2048}) as stack:
        yield stack
        assert stack.is_serving()


def refusal(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """Returns the code, reason and field of a call that must fail."""
    with pytest.raises(grpc.RpcError) as refused:
        call()
    status = rpc_status.from_call(refused.value)
    info, violation = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for message in (info, violation):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    fields = [v.field for v in violation.field_violations]
    return refused.value.code(), info.reason, fields[0] if fields else ""


GOOD: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 4}
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("empty prompt", {"prompt": []}, "INVALID_ARGUMENT", "prompt_token_ids"),
    ("token over the vocabulary", {"prompt": [49152]}, "INVALID_ARGUMENT", "prompt_token_ids"),
    ("no tokens asked for", {"max_tokens": 0}, "INVALID_ARGUMENT", "sampling.max_tokens"),
    ("nan", {"temperature": math.nan}, "INVALID_ARGUMENT", "sampling.temperature"),
    ("infinity", {"temperature": math.inf}, "INVALID_ARGUMENT", "sampling.temperature"),
    ("negative", {"temperature": -0.1}, "INVALID_ARGUMENT", "sampling.temperature"),
    ("no probability", {"top_p": 1.5}, "INVALID_ARGUMENT", "sampling.top_p"),
    ("no part", {"min_p": -0.5}, "INVALID_ARGUMENT", "sampling.min_p"),
    ("reward", {"repetition_penalty": -1.0}, "INVALID_ARGUMENT", "sampling.repetition_penalty"),
    ("presence", {"presence_penalty": 2.5}, "INVALID_ARGUMENT", "sampling.presence_penalty"),
    (
        "frequency",
        {"frequency_penalty": math.nan},
        "INVALID_ARGUMENT",
        "sampling.frequency_penalty",
    ),
    ("logprobs", {"logprobs": 21}, "INVALID_ARGUMENT", "sampling.logprobs"),
    ("all generated", {"generated_tokens": 3}, "INVALID_ARGUMENT", "generated_tokens"),
    (
        "over the context",
        {"max_tokens": 8192, "best_effort": True},
        "CONTEXT_LENGTH_EXCEEDED",
        "sampling.max_tokens",
    ),
    (
        "LS over the device memory",
        {"max_tokens": 2046},
        "CONTEXT_LENGTH_EXCEEDED",
        "sampling.max_tokens",
    ),
    (
        "a BE prompt over its share",
        {"prompt": [1] * 1024, "best_effort": True},
        "CONTEXT_LENGTH_EXCEEDED",
        "prompt_token_ids",
    ),
    ("beyond the tokens", {"resume_offset": 3}, "REQUEST_NOT_FOUND", ""),
]


@pytest.mark.parametrize(
    ("change", "reason", "field"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_a_bad_request_is_refused_by_name_and_hurts_no_other(
    stack: WorkerStack, change: dict[str, Any], reason: str, field: str
) -> None:
    other = stack.start([5, 6, 7], 16, ignore_eos=True)
    code, got, named = refusal(lambda: stack.generate(**(GOOD | change)))
    assert (got, named) == (reason, field)
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert len(other.finish()) == 16


def test_an_id_that_is_in_use_is_refused_for_another_prompt_or_tenant(stack: WorkerStack) -> None:
    first = stack.start([5, 6, 7], 1000, ignore_eos=True, request_id="taken")
    first.read(1)
    for change in ({"prompt": [5, 6, 8]}, {"tenant": "another"}):
        asked = {"prompt": [5, 6, 7], "max_tokens": 16, "request_id": "taken"} | change
        code, got, named = refusal(lambda asked=asked: stack.generate(**asked))
        assert (code, got, named) == (
            grpc.StatusCode.ALREADY_EXISTS,
            "REQUEST_EXISTS",
            "request_id",
        )
    assert stack.cancel(first)


def test_extremes_that_are_allowed_work(stack: WorkerStack) -> None:
    assert len(stack.generate([49151], 3, ignore_eos=True, seed=2**64 - 1, temperature=100.0)) == 3
    assert len(stack.generate([0], 1, ignore_eos=True, temperature=1e-9)) == 1
    assert len(stack.generate([1] * 2047, 1)) == 1


def test_limits_out_of_range_are_refused(stack: WorkerStack) -> None:
    for limits in (
        status_pb2.Limits(safety_margin=math.nan),
        status_pb2.Limits(be_device_kv_share=1.5),
    ):
        request = worker_pb2.SetLimitsRequest(limits=limits)
        _, reason, field = refusal(lambda request=request: stack.stub.SetLimits(request))
        assert (reason, field.split(".")[0]) == ("INVALID_ARGUMENT", "limits")


def start(*flags: str) -> tuple[int, list[str]]:
    """Runs a worker that must end by itself; returns its status and what it printed."""
    command = [sys.executable, "-m", "omniserve.gpuworker", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stderr.splitlines()


def test_an_unreadable_model_ends_the_start_with_one_line(tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.gguf"
    with MODEL_PATH.open("rb") as model:
        truncated.write_bytes(model.read(20_000_000))
    for path in (truncated, tmp_path / "missing.gguf"):
        flags = (f"--model-path={path}", f"--shm-dir={tmp_path}", "--listen=127.0.0.1:0")
        status, lines = start(*flags)
        assert status == 1
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"omniserve-gpuworker: MODEL_FILE: {path}")
    assert not list(tmp_path.glob("*.bell"))


def test_a_port_in_use_ends_the_start_with_its_address(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, lines = start(f"--listen={address}", f"--shm-dir={tmp_path}")
    assert status == 1
    # Before ours, gRPC's core prints a line of its own.
    assert lines[-1].startswith(f"omniserve-gpuworker: ADDRESS_IN_USE: cannot listen on {address}")


def test_too_few_slots_to_mirror_a_token_of_every_layer_end_the_start(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=80, hidden_size=64, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    flags = ("--load-format=dummy", f"--model-path={tmp_path}", f"--shm-dir={tmp_path}")
    servers = ("--attention-servers=127.0.0.1:1", "--transfer-slots=64", "--listen=127.0.0.1:0")
    status, lines = start(*flags, *servers)
    assert status == 2
    assert lines == [
        "omniserve-gpuworker: SETTINGS: transfer_slots must be at least the 80 layers of the model"
    ]


@pytest.mark.parametrize(
    "flag", ["--no-such-flag=1", "--threads=0", "--dtype=float16", "--kernel=z80"]
)
def test_a_bad_flag_ends_the_start_with_status_two(flag: str) -> None:
    status, lines = start(flag)
    assert status == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("omniserve-gpuworker: SETTINGS: ")
    assert flag.split("=")[0].strip("-") in lines[0].replace("_", "-")
