"""The connection to a control plane, in plain text or with TLS."""

from __future__ import annotations

from pathlib import Path

import grpc

from omniserve.channel import RECONNECT_OPTIONS, is_loopback, tls_credentials
from omniserve.errors import SettingsError

# A job's result with many log probabilities may be over the 4 MiB that gRPC takes by default.
_OPTIONS = [*RECONNECT_OPTIONS, ("grpc.max_receive_message_length", -1)]


def connect(
    address: str, *, tls: bool, tls_ca_file: str | Path | None, api_key: str
) -> grpc.Channel:
    """Raises SettingsError if the key would leave this machine in plain text."""
    if tls or tls_ca_file:
        return grpc.secure_channel(address, tls_credentials(tls_ca_file), _OPTIONS)
    if api_key and not is_loopback(address):
        raise SettingsError(
            f"the API key would go to {address} in plain text: use TLS", field="api_key"
        )
    return grpc.insecure_channel(address, _OPTIONS)
