"""What processes that call Redis have in common: how they get in, and how they stop.

Who imports this depends on redis-py itself: the SDK does not.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from omniserve.errors import SettingsError

_CONNECT_S = 1.0


def connect(url: str, password_file: Path | None, ca_file: Path | None, *, answer_s: float) -> Any:
    """Returns a client that connects on first use; replies are bytes, in RESP2 shapes.

    password_file: its first line is the password. ca_file: PEM, for `rediss://` (TLS). answer_s:
    longest wait for an answer. Raises SettingsError for what cannot be used.

    Typed Any: redis-py's annotations join sync and async replies, which nobody can await.
    """
    options = _options(url, password_file, ca_file)
    try:
        return redis.asyncio.from_url(
            url,
            protocol=2,
            socket_connect_timeout=_CONNECT_S,
            socket_timeout=answer_s,
            # One retry on a fresh connection: the server may have been restarted meanwhile.
            retry=Retry(NoBackoff(), 1),
            **options,
        )
    except ValueError as error:
        raise SettingsError(f"redis_url: {error}", field="redis_url") from error


def raise_if_cancelled() -> None:
    """To be called, in a task, after each call of Redis: it may have lost a cancellation.

    The client library uses `asyncio.wait_for`, which does so up to Python 3.11 where the answer
    comes at the same moment. The task would then go on for ever.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _options(url: str, password_file: Path | None, ca_file: Path | None) -> dict[str, Any]:
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


def _first_line(path: Path) -> str:
    try:
        line = path.read_text().partition("\n")[0].strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}", field="redis_password_file") from error
    if not line:
        raise SettingsError(f"{path}: no password in it", field="redis_password_file")
    return line
