"""What processes that call Redis have in common: how they get in, and how they stop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omniserve.errors import SettingsError


def options(url: str, password_file: Path | None, ca_file: Path | None) -> dict[str, Any]:
    """Returns keyword arguments of `redis.asyncio.from_url`. Raises SettingsError.

    password_file: its first line is the password. ca_file: PEM, for `rediss://` (TLS).
    """
    found: dict[str, Any] = {}
    if password_file is not None:
        if urlsplit(url).password:
            raise SettingsError("redis_url has a password too", field="redis_password_file")
        found["password"] = _first_line(password_file)
    if ca_file is not None:
        if not url.startswith("rediss://"):
            raise SettingsError("redis_url is not rediss://", field="redis_ca_file")
        if not ca_file.is_file():
            raise SettingsError(f"no file {ca_file}", field="redis_ca_file")
        found["ssl_ca_certs"] = str(ca_file)
    return found


def raise_if_cancelled() -> None:
    """To be called, in a task, after each call of Redis: it may have lost a cancellation.

    The client library uses `asyncio.wait_for`, which does so up to Python 3.11 where the answer
    comes at the same moment. The task would then go on for ever.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _first_line(path: Path) -> str:
    try:
        line = path.read_text().partition("\n")[0].strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}", field="redis_password_file") from error
    if not line:
        raise SettingsError(f"{path}: no password in it", field="redis_password_file")
    return line
