"""What every gRPC server of ours does alike: options, binding, health, reflection, errors, exit."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from omniserve.errors import AddressInUseError, OmniServeError, SettingsError, to_status
from omniserve.logs import last_words

# A request larger than this is refused by gRPC itself with RESOURCE_EXHAUSTED.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
SERVER_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a silent second listener
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]


def bind(server: Any, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Binds `server` (sync or aio) to `address`; returns the port. Raises AddressInUseError.

    Traffic is plain text without `credentials`.
    """
    try:
        if credentials is None:
            port = int(server.add_insecure_port(address))
        else:
            port = int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise AddressInUseError(f"cannot listen on {address}: {error}") from error
    if port == 0:
        raise AddressInUseError(f"cannot listen on {address}")
    return port


def add_reflection(server: Any, service_names: Sequence[str]) -> None:
    """Makes `service_names` and health listable with grpcurl."""
    health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection([*service_names, health, reflection.SERVICE_NAME], server)


def abort(context: grpc.ServicerContext, error: OmniServeError) -> NoReturn:
    """Ends a call of a sync server with the typed `error`."""
    context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort_with_status returned")


async def abort_aio(context: grpc.aio.ServicerContext[Any, Any], error: OmniServeError) -> NoReturn:
    """Ends a call of an aio server with the typed `error`."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returned")


@contextlib.contextmanager
def exit_on_error(process: str) -> Iterator[None]:
    """Turns a typed error of a process's main into one line of its log and an exit status."""
    try:
        yield
    except OmniServeError as error:
        named = error.field and not error.message.startswith(error.field)
        cause = f"{error.field}: {error.message}" if named else error.message
        last_words(process, f"{error.reason}: {cause}")
        sys.exit(2 if isinstance(error, SettingsError) else 1)
