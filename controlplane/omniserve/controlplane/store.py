"""The one Redis client of this process, and the typed error for when it does not answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from omniserve import redis_access
from omniserve.errors import SettingsError, StoreUnavailableError

# Longest wait for an answer. Blocking reads must stay well below it.
ANSWER_S = 2.0


def connect(url: str, options: dict[str, Any]) -> Any:
    """Returns a client that connects on first use; replies are bytes, in RESP2 shapes.

    options: of `omniserve.redis_access`.

    Typed Any: redis-py's annotations join sync and async replies, which nobody can await.
    """
    try:
        return redis.asyncio.from_url(
            url,
            protocol=2,
            socket_connect_timeout=1.0,
            socket_timeout=ANSWER_S,
            # One retry on a fresh connection: the server may have been restarted meanwhile.
            retry=Retry(NoBackoff(), 1),
            **options,
        )
    except ValueError as error:
        raise SettingsError(f"redis_url: {error}", field="redis_url") from error


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Turns any failure of Redis into StoreUnavailableError. All calls of Redis are made in it."""
    try:
        yield
    except (redis.exceptions.RedisError, OSError) as error:
        raise StoreUnavailableError(f"Redis: {error}", retry_after_s=1.0) from error
    redis_access.raise_if_cancelled()
