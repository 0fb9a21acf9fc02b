"""One request's tokens, across lost workers: a loss is a pause, never a gap or a repeat."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc

from omniserve.controlplane.router import Router, Worker
from omniserve.errors import (
    DrainingError,
    NoWorkerError,
    OmniServeError,
    RequestNotFoundError,
    from_rpc_error,
)
from omniserve.internal.v1 import worker_pb2
from omniserve.v1 import types_pb2

log = logging.getLogger(__name__)

RETRY_S = 0.1
CANCEL_TIMEOUT_S = 2.0
# What a worker that dies, stops or cannot be reached makes of a call.
_LOST_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)


@dataclass(frozen=True)
class Tokens:
    """Newly sampled tokens; `finish_reason` is set in the last of a stream."""

    token_ids: list[int]
    finish_reason: types_pb2.FinishReason = types_pb2.FINISH_REASON_UNSPECIFIED
    cached_tokens: int = 0
    """In the last: prompt tokens that the prefix cache of the worker had."""
    logprobs: Sequence[types_pb2.TokenLogprobs] = ()
    """One per token if asked for, else none."""


class WorkerLostError(Exception):
    """The worker is gone; the request may go on elsewhere."""


class TokenStream:
    """Runs `request` on `worker`, and on others when that one is lost.

    `base` is how many generated tokens are part of the prompt that the worker has: its offsets
    count behind them. `placed` is told of every worker that the request is sent to.
    """

    def __init__(
        self,
        router: Router,
        worker: Worker,
        request: worker_pb2.WorkerServiceGenerateRequest,
        *,
        cost: Callable[[Worker], float],
        patience_s: float,
        stop_tokens: frozenset[int],
        base: int = 0,
        timeout_s: float | None = None,
        placed: Callable[[Worker, int], None] = lambda _worker, _base: None,
    ) -> None:
        self.worker = worker
        self._router = router
        self._request = request
        self._best_effort = request.service_class == types_pb2.SERVICE_CLASS_BEST_EFFORT
        self._cost = cost
        self._patience_s = patience_s
        self._stop_tokens = stop_tokens
        self._base = base
        self._timeout_s = timeout_s
        self._placed = placed
        # Tokens before the first resume offset were read by another process: we never saw them.
        self._first_offset = request.resume_offset
        self._seen: list[int] = []
        self._cancelled = False
        self._finished = False
        self._lost: set[str] = set()
        """Workers that were lost since the last token: one that is stopping still looks idle."""
        self._call: Any = None

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def offset(self) -> int:
        """Generated tokens handed out so far, by this stream or before it."""
        return self._first_offset + len(self._seen)

    @property
    def base(self) -> int:
        """Generated tokens that are part of the prompt the worker has."""
        return self._base

    async def cancel(self) -> bool:
        """Ends the request at its worker at once; False if it had ended."""
        self._cancelled = True
        cancelled = await cancel_at(self.worker, self.request_id)
        if cancelled is None and self._call is not None:
            self._call.cancel()  # the worker ends it when nobody comes back to it
        return bool(cancelled) or not self._finished

    async def events(self) -> AsyncGenerator[Tokens, None]:
        """Raises NoWorkerError after `patience_s` without a worker, else the worker's error."""
        lost_s: float | None = None
        while True:
            if self._cancelled:
                yield Tokens([], types_pb2.FINISH_REASON_CANCELLED)
                return
            before = self.offset
            try:
                async with aclosing(self._attempt()) as tokens:
                    async for event in tokens:
                        self._finished = bool(event.finish_reason)
                        yield event
                        if self._finished:
                            return
            except RequestNotFoundError:
                # The worker restarted since, or its lease on the request has ended.
                if self._first_offset or self._base == self.offset:
                    raise
                self._base = self.offset
                continue
            except WorkerLostError as error:
                log.warning("%s lost %s: %s", self.request_id, self.worker.worker_id, error)
            if self.offset > before or lost_s is None:
                lost_s = time.monotonic()
                self._lost.clear()
            self._lost.add(self.worker.worker_id)
            ended = self._ended()
            if ended is None and not await self._move(lost_s):
                ended = types_pb2.FINISH_REASON_CANCELLED
            if ended is not None:
                yield Tokens([], ended)
                return

    async def _attempt(self) -> AsyncGenerator[Tokens, None]:
        self._placed(self.worker, self._base)
        worker = self.worker
        try:
            call = self.worker.stub.Generate(self._worker_request(), timeout=self._timeout_s)
            self._call = call
        except grpc.aio.UsageError as error:
            raise WorkerLostError("its channel is closed") from error
        worker.be_in_flight += self._best_effort
        try:
            async for response in call:
                # A worker may send again what it sent before; hand out only what is new.
                repeated = self.offset - self._base - response.offset
                if repeated < 0:
                    raise WorkerLostError(f"it skipped {-repeated} tokens")
                fresh = list(response.token_ids)[repeated:]
                self._seen += fresh
                yield Tokens(
                    fresh,
                    response.finish_reason,
                    response.cached_tokens,
                    response.logprobs[repeated:],
                )
        except grpc.aio.AioRpcError as error:
            typed = from_rpc_error(error)
            if isinstance(typed, DrainingError | NoWorkerError):
                raise WorkerLostError(typed.message) from error
            if typed is not None:
                raise typed from error
            if error.code() in _LOST_CODES:
                raise WorkerLostError(f"{error.code().name} {error.details()}") from error
            raise OmniServeError(f"worker: {error.code().name} {error.details()}") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise WorkerLostError("its channel was closed") from error
        finally:
            worker.be_in_flight -= self._best_effort
            call.cancel()
        raise WorkerLostError("its stream ended early")

    async def _move(self, lost_s: float) -> bool:
        """Waits for a worker to go on at, another or the same again; False if cancelled."""
        while True:
            if time.monotonic() - lost_s > self._patience_s:
                raise NoWorkerError(f"no worker for {self._patience_s:.0f} s", retry_after_s=1.0)
            await asyncio.sleep(RETRY_S)
            if self._cancelled:
                return False
            try:
                worker = self._router.pick(self._cost, avoid=self._lost)
            except NoWorkerError:
                continue
            if worker.worker_id in self._lost:  # as all are: any of them may be back
                self._lost = {self.worker.worker_id}
            if worker.worker_id != self.worker.worker_id:
                if self._first_offset:
                    continue  # only the old worker has the tokens before our first offset
                self._base = self.offset
            self.worker = worker
            return True

    def _worker_request(self) -> worker_pb2.WorkerServiceGenerateRequest:
        """The request with `base` generated tokens behind its prompt, resumed at our offset.

        With offset = base it reads the same as a new request, so it starts one if need be.
        """
        attempt = worker_pb2.WorkerServiceGenerateRequest()
        attempt.CopyFrom(self._request)
        if not self._first_offset:
            attempt.prompt_token_ids.extend(self._seen[: self._base])
        attempt.generated_tokens = self._base
        attempt.sampling.max_tokens -= self._base
        attempt.resume_offset = self.offset - self._base
        return attempt

    def _ended(self) -> types_pb2.FinishReason | None:
        """The finish that a lost worker did not get to report, if the tokens show it."""
        if self._cancelled:
            return types_pb2.FINISH_REASON_CANCELLED
        sampling = self._request.sampling
        if self._seen and self._seen[-1] in self._stop_tokens and not sampling.ignore_eos:
            return types_pb2.FINISH_REASON_STOP
        if self.offset >= sampling.max_tokens:
            return types_pb2.FINISH_REASON_LENGTH
        return None


async def cancel_at(worker: Worker, request_id: str) -> bool | None:
    """Cancels explicitly at `worker`; whether it still ran there, None if that is not known."""
    request = worker_pb2.WorkerServiceCancelRequest(request_id=request_id)
    try:
        response = await worker.stub.Cancel(request, timeout=CANCEL_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        log.info("cancel %s at %s: %s", request_id, worker.worker_id, error.code().name)
        return None
    except grpc.aio.UsageError:  # the worker is gone and its channel closed
        return None
    return bool(response.cancelled)
