"""Who may call the public port, and what protects the calls: TLS and API keys."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from omniserve.api_keys import METADATA_KEY, bearer, read_keys
from omniserve.channel import is_loopback
from omniserve.controlplane.settings import Settings
from omniserve.errors import SettingsError, UnauthenticatedError
from omniserve.rpc import abort_aio

# Health tells nothing worth a key, and those who ask for it, such as probes, have none.
OPEN_METHODS = "/grpc.health.v1.Health/"

Continuation = Callable[[Any], Awaitable[Any]]


def credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Returns the server's certificate and key, None for plain text. Raises SettingsError."""
    cert, key = settings.tls_cert_file, settings.tls_key_file
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        missing = "tls_cert_file" if cert is None else "tls_key_file"
        raise SettingsError("certificate and key are of no use without each other", field=missing)
    try:
        # gRPC would take any bytes, and fail every handshake.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
        return grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    except OSError as error:  # also ssl.SSLError
        raise SettingsError(f"{cert}, {key}: {error}", field="tls_cert_file") from error


def interceptors(settings: Settings) -> Sequence[grpc.aio.ServerInterceptor]:
    """Returns what checks keys, if there is a file of them. Raises SettingsError."""
    if settings.api_key_file is None:
        return []
    keys = read_keys(settings.api_key_file)
    if settings.tls_cert_file is None and not is_loopback(settings.listen):
        raise SettingsError(
            f"keys would come to {settings.listen} in plain text: give tls_cert_file and "
            "tls_key_file, or listen on a loopback address",
            field="api_key_file",
        )
    return [ApiKeys(keys)]


class ApiKeys(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without a known key."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(bearer(key)) for key in keys]

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        details = handler_call_details
        if details.method.startswith(OPEN_METHODS) or self._knows(details.invocation_metadata):
            return await continuation(details)
        # A stream in both directions, so that nothing of the request is read, of any kind of call.
        return grpc.stream_stream_rpc_method_handler(_refuse)

    def _knows(self, metadata: Sequence[tuple[str, str | bytes]]) -> bool:
        """How long it takes tells nothing of the keys."""
        given = [_digest(str(value)) for name, value in metadata if name == METADATA_KEY]
        return any([hmac.compare_digest(g, known) for g in given for known in self._digests])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


async def _refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await abort_aio(context, UnauthenticatedError("no API key, or an unknown one"))
