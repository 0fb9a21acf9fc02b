"""A running request, as `Client.generate` returns it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import grpc

from omniserve.client import _wire
from omniserve.client._errors import typed
from omniserve.client._types import Chunk, FinishReason, Usage
from omniserve.errors import OmniServeError
from omniserve.v1 import inference_pb2


class Generation(Iterator[Chunk]):
    """Iterates over the chunks of one request; typed errors are raised from `__next__`.

    One thread iterates; any thread may cancel. As a context manager it cancels, on leaving,
    what has not ended.
    """

    def __init__(
        self,
        call: Any,
        request_id: str,
        address: str,
        cancel: Callable[[str], bool],
    ) -> None:
        self._call = call
        self._request_id = request_id
        self._address = address
        self._cancel = cancel
        self._cancelled = False
        self._finish_reason: FinishReason | None = None
        self._usage: Usage | None = None

    @property
    def request_id(self) -> str:
        """Name of the request, for cancelling and resuming it."""
        return self._request_id

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it runs."""
        return self._finish_reason

    @property
    def usage(self) -> Usage | None:
        """What it used; None while it runs, or if the server did not say."""
        return self._usage

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Chunk:
        if self._finish_reason is not None:
            raise StopIteration
        try:
            return self._receive(next(self._call))
        except StopIteration:
            self._finish_reason = self._finish_reason or FinishReason.UNSPECIFIED
            raise
        except grpc.RpcError as error:
            if self._cancelled and error.code() is grpc.StatusCode.CANCELLED:
                self._finish_reason = FinishReason.CANCELLED
                raise StopIteration from None
            self._finish_reason = FinishReason.ERROR
            raise typed(error, self._address) from error

    def _receive(self, response: inference_pb2.GenerateResponse) -> Chunk:
        if response.WhichOneof("event") == "finished":
            self._finish_reason = _wire.finish_reason(response.finished.reason)
            self._usage = _wire.usage(response.finished.usage)
            raise StopIteration
        return _wire.chunk(response.chunk)

    def text(self) -> str:
        """Waits for the end and returns the text of the chunks not yet taken."""
        return "".join(chunk.text for chunk in self)

    def cancel(self) -> None:
        """Ends the request and frees its memory. The stream then ends; repeating is harmless."""
        if self._finish_reason is not None:
            return
        self._cancelled = True
        try:
            known = self._cancel(self._request_id)
        except OmniServeError:
            known = False
        if not known:  # nobody will end the stream for us
            self._call.cancel()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()
