"""What users of the SDK may rely on: its names, its light imports, its likeness to the protocol."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

import omniserve.client
from omniserve.client import (
    AttentionServerStatus,
    Chunk,
    FinishReason,
    JobState,
    Limits,
    SamplingParams,
    ServiceClass,
    Slo,
    Status,
    Telemetry,
    TokenLogprob,
    TokenLogprobs,
    TokensByPath,
    Usage,
    WorkerStatus,
)
from omniserve.v1 import inference_pb2, jobs_pb2, status_pb2, types_pb2

EXPORTED = {
    "DEFAULT_ADDRESS", "AttentionServerStatus", "CallCancelledError", "Chunk", "Client",
    "DeadlineExceededError", "FinishReason", "Generation", "Job", "JobCounts", "JobItem",
    "JobResult", "JobState", "Limits", "Message", "MessageTooLargeError", "Model",
    "OmniServeError", "SamplingParams", "ServiceClass", "Slo", "Status", "Telemetry",
    "TokenLogprob", "TokenLogprobs", "TokensByPath", "UnauthenticatedError", "UnreachableError",
    "Usage", "WorkerStatus",
}  # fmt: skip


def test_the_exported_names_are_the_agreed_ones() -> None:
    assert set(omniserve.client.__all__) == EXPORTED


@pytest.mark.parametrize(
    "heavy", ["torch", "transformers", "matplotlib", "numpy", "pydantic", "rich", "redis"]
)
def test_importing_the_sdk_does_not_import(heavy: str) -> None:
    code = f"import sys, omniserve.client; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (SamplingParams, types_pb2.SamplingParams),
        (Slo, types_pb2.Slo),
        (TokenLogprob, types_pb2.TokenLogprob),
        (TokenLogprobs, types_pb2.TokenLogprobs),
        (Chunk, inference_pb2.Chunk),
        (Usage, types_pb2.Usage),
        (Limits, status_pb2.Limits),
        (TokensByPath, status_pb2.TokensByPath),
        (Telemetry, status_pb2.Telemetry),
        (AttentionServerStatus, status_pb2.AttentionServerStatus),
        (WorkerStatus, status_pb2.WorkerStatus),
        (Status, status_pb2.GetStatusResponse),
    ],
)
def test_values_have_the_fields_of_their_messages(value: Any, message: Any) -> None:
    assert {f.name for f in fields(value)} == set(message.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize(
    ("value", "names", "prefix"),
    [
        (ServiceClass, types_pb2.ServiceClass.keys(), "SERVICE_CLASS_"),
        (FinishReason, types_pb2.FinishReason.keys(), "FINISH_REASON_"),
        (JobState, jobs_pb2.JobState.keys(), "JOB_STATE_"),
    ],
)
def test_enums_have_the_names_of_the_protocol(value: Any, names: list[str], prefix: str) -> None:
    known = {name.removeprefix(prefix) for name in names} - {"UNSPECIFIED"}
    assert {member.name for member in value} - {"UNSPECIFIED"} == known
