"""Python SDK of OmniServe.

from omniserve.client import Client

with Client("127.0.0.1:8500") as client:
    for chunk in client.generate("Why is the sky blue?"):
        print(chunk.text, end="", flush=True)
"""

from omniserve.client._client import DEFAULT_ADDRESS, Client
from omniserve.client._errors import (
    CallCancelledError,
    DeadlineExceededError,
    MessageTooLargeError,
    UnreachableError,
)
from omniserve.client._generation import Generation
from omniserve.client._status import (
    AttentionServerStatus,
    Limits,
    Status,
    Telemetry,
    TokensByPath,
    WorkerStatus,
)
from omniserve.client._types import (
    Chunk,
    FinishReason,
    Job,
    JobCounts,
    JobItem,
    JobResult,
    JobState,
    Message,
    Model,
    SamplingParams,
    ServiceClass,
    Slo,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from omniserve.errors import OmniServeError, UnauthenticatedError

__all__ = [
    "DEFAULT_ADDRESS",
    "AttentionServerStatus",
    "CallCancelledError",
    "Chunk",
    "Client",
    "DeadlineExceededError",
    "FinishReason",
    "Generation",
    "Job",
    "JobCounts",
    "JobItem",
    "JobResult",
    "JobState",
    "Limits",
    "Message",
    "MessageTooLargeError",
    "Model",
    "OmniServeError",
    "SamplingParams",
    "ServiceClass",
    "Slo",
    "Status",
    "Telemetry",
    "TokenLogprob",
    "TokenLogprobs",
    "TokensByPath",
    "UnauthenticatedError",
    "UnreachableError",
    "Usage",
    "WorkerStatus",
]
