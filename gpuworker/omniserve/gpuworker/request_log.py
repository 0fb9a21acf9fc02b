"""Tokens of one request as the front keeps them: until acknowledged, or the orphan lease ends."""

from __future__ import annotations

import asyncio
import hashlib
import random

import numpy as np

from omniserve.internal.v1 import worker_pb2
from omniserve.v1 import types_pb2

# With twenty log probabilities each they stay far below the 4 MiB that gRPC takes by default.
TOKENS_PER_MESSAGE = 1024


class RequestLog:
    """Written by the engine's events, read by the stream that serves the request (or resumes).

    Readers see the first `released` tokens. With an `interval_s` tokens gather about so long
    before they are released together: every message costs CPU time in each process that it passes.
    """

    def __init__(
        self, request: worker_pb2.WorkerServiceGenerateRequest, interval_s: float = 0.0
    ) -> None:
        self.request_id = request.request_id
        self.best_effort = request.service_class == types_pb2.SERVICE_CLASS_BEST_EFFORT
        self.generated_before = request.generated_tokens
        """Tokens that another worker generated: ours follow them."""
        self._tenant = request.tenant
        self._prompt_tokens = len(request.prompt_token_ids) - request.generated_tokens
        self._prompt = self._digest(request)
        self.tokens: list[int] = []
        self.released = 0
        self.logprobs: list[types_pb2.TokenLogprobs] = []
        """One per token if the request asked for them, else none."""
        self.finish_reason = types_pb2.FINISH_REASON_UNSPECIFIED
        self.error = ""
        self.cached_tokens = 0
        self.readers = 0
        self.expiry: asyncio.TimerHandle | None = None
        """Ends the orphan lease, while nobody reads."""
        self.dropped = False
        """Told to end, because nobody came back in time or it is not what is asked for now."""
        self._waiting: list[asyncio.Future[None]] = []
        # Requests that sample together must not send together for ever: LS streams would wait.
        self._interval_s = interval_s * random.uniform(0.5, 1.5)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        return self.finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED

    def is_for(self, request: worker_pb2.WorkerServiceGenerateRequest) -> bool:
        """Whether `request` has the same tenant and prompt.

        Behind the prompt it may have what other workers generated; a client that resumes leaves
        that out.
        """
        behind = len(request.prompt_token_ids) - self._prompt_tokens
        return (
            request.tenant == self._tenant
            and behind in (0, request.generated_tokens)
            and self._digest(request) == self._prompt
        )

    def _digest(self, request: worker_pb2.WorkerServiceGenerateRequest) -> bytes:
        prompt = np.array(request.prompt_token_ids[: self._prompt_tokens], dtype=np.uint32)
        return hashlib.sha256(prompt.tobytes()).digest()

    def append(self, token: int, logprobs: types_pb2.TokenLogprobs | None) -> None:
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if not self._interval_s:
            self.release()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._interval_s, self.release)

    def end(self, reason: types_pb2.FinishReason, error: str = "") -> None:
        self.finish_reason = reason
        self.error = error
        self.release()

    async def wait_beyond(self, offset: int) -> None:
        """Returns when over `offset` tokens are released, or the request has ended."""
        while self.released <= offset and not self.ended:
            changed = asyncio.get_running_loop().create_future()
            self._waiting.append(changed)
            await changed

    def message(self, offset: int) -> worker_pb2.WorkerServiceGenerateResponse:
        """The released tokens from `offset` on, but no more than a message may have."""
        new = slice(offset, min(self.released, offset + TOKENS_PER_MESSAGE))
        return worker_pb2.WorkerServiceGenerateResponse(
            offset=offset, token_ids=self.tokens[new], logprobs=self.logprobs[new]
        )

    def release(self) -> None:
        """Readers see all tokens that are there."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.released = len(self.tokens)
        for changed in self._waiting:
            if not changed.done():  # its reader's call may have been cancelled
                changed.set_result(None)
        self._waiting.clear()
