"""Tokens of one request as the front keeps them: until acknowledged, or the orphan lease ends."""

from __future__ import annotations

import asyncio

from omniserve.v1 import types_pb2


class RequestLog:
    """Written by the engine's events, read by the stream that serves the request (or resumes)."""

    def __init__(self, request_id: str, *, best_effort: bool) -> None:
        self.request_id = request_id
        self.best_effort = best_effort
        self.tokens: list[int] = []
        self.logprobs: list[types_pb2.TokenLogprobs] = []
        """One per token if the request asked for them, else none."""
        self.finish_reason = types_pb2.FINISH_REASON_UNSPECIFIED
        self.error = ""
        self.cached_tokens = 0
        self.readers = 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def ended(self) -> bool:
        return self.finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED

    def append(self, token: int, logprobs: types_pb2.TokenLogprobs | None) -> None:
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self._wake()

    def end(self, reason: types_pb2.FinishReason, error: str = "") -> None:
        self.finish_reason = reason
        self.error = error
        self._wake()

    async def wait_beyond(self, offset: int) -> None:
        """Returns when there are more than `offset` tokens, or the request has ended."""
        while len(self.tokens) <= offset and not self.ended:
            changed = asyncio.get_running_loop().create_future()
            self._waiting.append(changed)
            await changed

    def _wake(self) -> None:
        for changed in self._waiting:
            if not changed.done():  # its reader's call may have been cancelled
                changed.set_result(None)
        self._waiting.clear()
