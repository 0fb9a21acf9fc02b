"""RPC failures as typed errors, those of omniserve.errors and those that only a client sees."""

from __future__ import annotations

import grpc

from omniserve.errors import (
    InvalidArgumentError,
    OmniServeError,
    UnauthenticatedError,
    from_rpc_error,
)


class UnreachableError(OmniServeError):
    """No server answered: not started, gone, or the connection broke."""

    reason = "UNREACHABLE"
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_code = 503


class DeadlineExceededError(OmniServeError):
    """The answer did not come within the caller's timeout."""

    reason = "DEADLINE_EXCEEDED"
    grpc_code = grpc.StatusCode.DEADLINE_EXCEEDED
    http_code = 504


class CallCancelledError(OmniServeError):
    """The call was ended before its answer was complete."""

    reason = "CALL_CANCELLED"
    grpc_code = grpc.StatusCode.CANCELLED
    http_code = 499


class MessageTooLargeError(InvalidArgumentError):
    """The request is over the server's message size limit."""

    reason = "MESSAGE_TOO_LARGE"
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_code = 413


_UNTYPED: dict[grpc.StatusCode, type[OmniServeError]] = {
    grpc.StatusCode.UNAVAILABLE: UnreachableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
}

# What gRPC says of a connection that fails, and what a caller can make of it.
_HINTS = {
    "Socket closed": "the server may expect TLS",
    "WRONG_VERSION_NUMBER": "the server does not speak TLS",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not trusted",
}


def typed(error: grpc.RpcError, address: str) -> OmniServeError:
    """Returns the typed error behind `error`, an RPC to the server at `address`."""
    known = from_rpc_error(error)
    if known is not None:
        return known
    code, details = error.code(), error.details() or ""
    # gRPC itself refuses such a message, before any code of ours could add details.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return MessageTooLargeError(details, field="prompt")
    if details.startswith("failed to connect"):
        details = "; ".join([*(_HINTS[sign] for sign in _HINTS if sign in details), details])
    return _UNTYPED.get(code, OmniServeError)(f"{address}: {code.name}: {details}")
