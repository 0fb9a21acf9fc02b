"""The edge where typed errors become gRPC statuses."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from omniserve.errors import OmniServeError
from omniserve.rpc import abort_aio

_Servicer = TypeVar("_Servicer")
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
Handler = Callable[[_Servicer, _Request, Any], Awaitable[_Response]]


def typed_errors(
    handler: Handler[_Servicer, _Request, _Response],
) -> Handler[_Servicer, _Request, _Response]:
    """Ends the call of an aio `handler` with the typed error that it raises."""

    @functools.wraps(handler)
    async def wrapped(servicer: _Servicer, request: _Request, context: Any) -> _Response:
        try:
            return await handler(servicer, request, context)
        except OmniServeError as error:
            await abort_aio(context, error)

    return wrapped
