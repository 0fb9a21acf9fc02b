"""How this process calls Redis, and the typed error for when it does not answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import redis.exceptions

from omniserve import redis_access
from omniserve.errors import StoreUnavailableError

# Longest wait for an answer. Blocking reads must stay well below it.
ANSWER_S = 2.0


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Turns any failure of Redis into StoreUnavailableError. All calls of Redis are made in it."""
    try:
        yield
    except (redis.exceptions.RedisError, OSError) as error:
        raise StoreUnavailableError(f"Redis: {error}", retry_after_s=1.0) from error
    redis_access.raise_if_cancelled()
