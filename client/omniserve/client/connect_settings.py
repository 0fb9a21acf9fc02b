"""Where the deployment is, and how to be let in: settings of every command that calls one."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from omniserve.api_keys import read_keys
from omniserve.client import DEFAULT_ADDRESS, Client


class ConnectSettings(BaseSettings):
    """Each field is a flag and, in capitals, an OMNISERVE_* variable; the key only the latter."""

    model_config = SettingsConfigDict(
        env_prefix="OMNISERVE_", env_ignore_empty=True, frozen=True, extra="forbid"
    )

    address: str = Field(default=DEFAULT_ADDRESS, description="Control plane, host:port.")
    tls: bool = Field(default=False, description="Use TLS, and trust the roots that gRPC brings.")
    tls_ca_file: str = Field(
        default="", description="Use TLS, and trust the certificates in this PEM file."
    )
    api_key_file: str = Field(default="", description="File with the API key in a line.")
    api_key: SecretStr = Field(default=SecretStr(""), description="The key itself, without a file.")

    def client(self, *, timeout_s: float = 30.0) -> Client:
        """Raises SettingsError for a file that cannot be used."""
        key = self.api_key.get_secret_value()
        if self.api_key_file:
            key = read_keys(Path(self.api_key_file))[0]
        return Client(
            self.address,
            tls=self.tls,
            tls_ca_file=self.tls_ca_file or None,
            api_key=key,
            timeout_s=timeout_s,
        )
