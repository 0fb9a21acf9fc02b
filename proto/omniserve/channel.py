"""How our processes and clients reach a gRPC server: reconnection, and TLS."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import grpc

from omniserve.errors import SettingsError

# A server that was restarted is found again within seconds, also at another IP address. By
# default gRPC waits up to two minutes between attempts, and 30 s between two look-ups of a name.
RECONNECT_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 3000),  # how long an attempt may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
]


def tls_credentials(ca_file: str | Path | None) -> grpc.ChannelCredentials:
    """Trusts the certificates in the PEM file `ca_file`, or the roots that gRPC brings.

    Raises SettingsError if the file cannot be read.
    """
    if not ca_file:
        return grpc.ssl_channel_credentials()
    try:
        roots = Path(ca_file).read_bytes()
    except OSError as error:
        raise SettingsError(f"{ca_file}: {error.strerror}", field="tls_ca_file") from error
    if b"-----BEGIN CERTIFICATE-----" not in roots:
        raise SettingsError(f"{ca_file}: no certificate in it", field="tls_ca_file")
    return grpc.ssl_channel_credentials(roots)


def is_loopback(address: str) -> bool:
    """Whether what is sent to or from `address`, "host:port", stays on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or address.startswith("unix:")
