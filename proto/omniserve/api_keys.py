"""API keys of the public port: how they are kept in files and sent in calls.

The control plane checks them, the client sends one.
"""

from __future__ import annotations

from pathlib import Path

from omniserve.errors import SettingsError

METADATA_KEY = "authorization"


def read_keys(path: Path) -> list[str]:
    """Returns the keys in a file: one a line; empty lines and `#` comments do not count.

    Raises SettingsError if there is none, or one that cannot be sent.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}", field="api_key_file") from error
    found = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise SettingsError(
                f"{path}: line {number}: a key has printable ASCII characters and no spaces",
                field="api_key_file",
            )
        found.append(key)
    if not found:
        raise SettingsError(f"{path}: no key in it", field="api_key_file")
    return found


def bearer(key: str) -> str:
    """Returns the value of METADATA_KEY that carries `key`."""
    return f"Bearer {key}"
