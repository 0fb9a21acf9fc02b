"""The errors that cross processes, and the one table that maps each to its gRPC and HTTP code.

Services raise these; edges turn them into a `google.rpc.Status` with `to_status`, and clients
read them back with `from_rpc_error`. `reason` is machine-readable and never renamed.
"""

from __future__ import annotations

from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "omniserve"


class OmniServeError(Exception):
    """Base of all typed errors. `metadata` values are strings and go into `ErrorInfo`."""

    reason: ClassVar[str] = "INTERNAL"
    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_code: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        retry_after_s: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = metadata or {}


class InvalidArgumentError(OmniServeError):
    """A field of the request cannot be served; `field` names it."""

    reason = "INVALID_ARGUMENT"
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    http_code = 400


class ContextLengthExceededError(InvalidArgumentError):
    """Prompt + max_tokens is more than the model's context, or than the memory of its class."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class UnauthenticatedError(OmniServeError):
    """The call has no API key, or one that is not known."""

    reason = "UNAUTHENTICATED"
    grpc_code = grpc.StatusCode.UNAUTHENTICATED
    http_code = 401


class ModelNotFoundError(OmniServeError):
    reason = "MODEL_NOT_FOUND"
    grpc_code = grpc.StatusCode.NOT_FOUND
    http_code = 404


class JobNotFoundError(OmniServeError):
    reason = "JOB_NOT_FOUND"
    grpc_code = grpc.StatusCode.NOT_FOUND
    http_code = 404


class RequestNotFoundError(OmniServeError):
    """A resumed request is not, or no longer, known."""

    reason = "REQUEST_NOT_FOUND"
    grpc_code = grpc.StatusCode.NOT_FOUND
    http_code = 404


class RequestExistsError(OmniServeError):
    reason = "REQUEST_EXISTS"
    grpc_code = grpc.StatusCode.ALREADY_EXISTS
    http_code = 409


class SloUnattainableError(OmniServeError):
    """Admission predicts that this LS request, or a running one, would miss its SLO."""

    reason = "SLO_UNATTAINABLE"
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_code = 429


class QueueFullError(OmniServeError):
    reason = "QUEUE_FULL"
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_code = 429


class NoWorkerError(OmniServeError):
    reason = "NO_WORKER"
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_code = 503


class StoreUnavailableError(OmniServeError):
    """Redis cannot be reached."""

    reason = "STORE_UNAVAILABLE"
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_code = 503


class DrainingError(OmniServeError):
    """The process is stopping and takes no new work."""

    reason = "DRAINING"
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_code = 503


class ModelFileError(OmniServeError):
    """The model file cannot be read: missing, truncated, or of a kind we do not know."""

    reason = "MODEL_FILE"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


class AddressInUseError(OmniServeError):
    reason = "ADDRESS_IN_USE"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


class SharedMemoryError(OmniServeError):
    """Shared memory is too small; metadata has `needed_bytes` and `available_bytes`."""

    reason = "SHARED_MEMORY"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


class GeometryError(OmniServeError):
    """Worker and attention server do not agree on shapes or layout version."""

    reason = "GEOMETRY"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


class SettingsError(OmniServeError):
    """An unknown or unusable setting; processes exit 2 on it."""

    reason = "SETTINGS"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


def _all_types(base: type[OmniServeError]) -> list[type[OmniServeError]]:
    return [base, *(t for sub in base.__subclasses__() for t in _all_types(sub))]


BY_REASON: dict[str, type[OmniServeError]] = {t.reason: t for t in _all_types(OmniServeError)}


def to_status(error: OmniServeError) -> status_pb2.Status:
    """Returns the wire form of `error`: code, message and details."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    packed = [_pack(info)]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        packed.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        packed.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    code = code_pb2.Code.Value(error.grpc_code.name)
    return status_pb2.Status(code=code, message=error.message, details=packed)


def from_rpc_error(rpc_error: grpc.RpcError) -> OmniServeError | None:
    """Returns the typed error behind an RPC error, or None if the peer sent none."""
    status = rpc_status.from_call(rpc_error)
    if status is None:
        return None
    return from_status(status)


def from_status(status: status_pb2.Status) -> OmniServeError | None:
    """Inverse of `to_status`; None if the status carries no ErrorInfo of ours."""
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad, retry):
            detail.Unpack(message)
    if info.domain != DOMAIN:
        return None
    error_type = BY_REASON.get(info.reason, OmniServeError)
    return error_type(
        status.message,
        field=bad.field_violations[0].field if bad.field_violations else "",
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9
        if retry.HasField("retry_delay")
        else None,
        metadata=dict(info.metadata),
    )


def _pack(message: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)  # type: ignore[arg-type]
    return packed
