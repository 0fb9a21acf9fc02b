"""The gRPC front of a worker: checks requests, keeps their tokens, and talks to the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import grpc

from omniserve.errors import (
    BY_REASON,
    ContextLengthExceededError,
    DrainingError,
    InvalidArgumentError,
    NoWorkerError,
    OmniServeError,
    RequestExistsError,
    RequestNotFoundError,
)
from omniserve.gpuworker.channel import FrontChannel
from omniserve.gpuworker.request_log import RequestLog
from omniserve.gpuworker.settings import WorkerSettings
from omniserve.internal.v1 import engine_pb2, worker_pb2, worker_pb2_grpc
from omniserve.rpc import abort_aio
from omniserve.sampling import check_sampling
from omniserve.v1 import status_pb2, types_pb2

_log = logging.getLogger(__name__)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class WorkerFront(worker_pb2_grpc.WorkerServiceServicer):
    """Serves WorkerService. One log per request; the engine's events fill them."""

    def __init__(
        self,
        settings: WorkerSettings,
        channel: FrontChannel,
        server_stats: Callable[[], list[status_pb2.AttentionServerStatus]],
    ) -> None:
        self._settings = settings
        self._server_stats = server_stats
        self._channel = channel
        self._logs: dict[str, RequestLog] = {}
        self._ready: asyncio.Future[engine_pb2.EngineReady] = (
            asyncio.get_running_loop().create_future()
        )
        self._draining = False
        self.telemetry = status_pb2.Telemetry()

    async def ready(self) -> engine_pb2.EngineReady:
        """Waits for the engine's start. Raises its typed start error."""
        return await asyncio.shield(self._ready)

    def apply(self, event: engine_pb2.EngineEvent) -> None:
        """Takes one event of the engine."""
        kind = event.WhichOneof("event")
        if kind == "sampled":
            sampled = event.sampled
            for index, request_id in enumerate(sampled.request_ids):
                if log := self._logs.get(request_id):
                    log.append(sampled.token_ids[index], sampled.logprobs.get(index))
        elif kind == "ended":
            if log := self._logs.get(event.ended.request_id):
                log.cached_tokens = event.ended.cached_tokens
                log.end(event.ended.reason, event.ended.error)
                if log.dropped:
                    del self._logs[log.request_id]
                elif log.readers == 0:
                    self._expire_later(log)
        elif kind == "telemetry":
            self.telemetry = event.telemetry
        elif kind == "ready":
            self._ready.set_result(event.ready)
        elif kind == "failed":
            error_type = BY_REASON.get(event.failed.reason, OmniServeError)
            self._ready.set_exception(error_type(event.failed.message))

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests and waits for the running LS ones.

        BE is not waited for: where its streams break off, control planes go on elsewhere.
        """
        self._draining = True
        deadline = asyncio.get_running_loop().time() + timeout_s
        while any(not (log.best_effort or log.ended) for log in self._logs.values()):
            if asyncio.get_running_loop().time() >= deadline:
                return
            await asyncio.sleep(0.05)

    def release(self) -> None:
        """Lets streams send what has gathered: the worker ends."""
        for log in self._logs.values():
            log.release()

    # --- WorkerService -------------------------------------------------------------------

    async def Generate(  # noqa: N802
        self, request: worker_pb2.WorkerServiceGenerateRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WorkerServiceGenerateResponse]:
        try:
            log = self._open(request)
        except OmniServeError as error:
            await abort_aio(context, error)
        log.readers += 1
        if log.expiry is not None:
            log.expiry.cancel()
        offset = request.resume_offset
        try:
            while True:
                await log.wait_beyond(offset)
                message = log.message(offset)
                if message.token_ids:
                    yield message
                    offset += len(message.token_ids)
                if log.ended and offset >= len(log.tokens):
                    break
            if log.finish_reason == types_pb2.FINISH_REASON_ERROR:
                await abort_aio(context, OmniServeError(log.error))
            yield worker_pb2.WorkerServiceGenerateResponse(
                offset=offset,
                finish_reason=log.finish_reason,
                cached_tokens=log.cached_tokens,
            )
            if self._logs.get(log.request_id) is log:
                del self._logs[log.request_id]
        finally:
            log.readers -= 1
            if log.readers == 0 and self._logs.get(log.request_id) is log:
                self._expire_later(log)

    async def Cancel(  # noqa: N802
        self,
        request: worker_pb2.WorkerServiceCancelRequest,
        context: Context,
    ) -> worker_pb2.WorkerServiceCancelResponse:
        log = self._logs.get(request.request_id)
        known = log is not None and not log.ended
        if known:
            try:
                self._channel.send(engine_pb2.EngineCommand(cancel=request.request_id))
            except NoWorkerError as error:
                await abort_aio(context, error)
        return worker_pb2.WorkerServiceCancelResponse(cancelled=known)

    async def SetLimits(  # noqa: N802
        self, request: worker_pb2.SetLimitsRequest, context: Context
    ) -> worker_pb2.SetLimitsResponse:
        limits = request.limits
        for field in ("be_device_kv_share", "safety_margin"):
            if not 0.0 <= getattr(limits, field) <= 1.0:
                await abort_aio(
                    context,
                    InvalidArgumentError(f"{field} must be 0 to 1", field=f"limits.{field}"),
                )
        try:
            self._channel.send(engine_pb2.EngineCommand(limits=limits))
        except NoWorkerError as error:
            await abort_aio(context, error)
        return worker_pb2.SetLimitsResponse()

    async def GetWorkerStatus(  # noqa: N802
        self,
        request: worker_pb2.GetWorkerStatusRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> worker_pb2.GetWorkerStatusResponse:
        return await self.status()

    async def status(self) -> worker_pb2.GetWorkerStatusResponse:
        """Returns what this worker says of itself."""
        ready = await self.ready()
        settings = self._settings
        status = status_pb2.WorkerStatus(
            worker_id=settings.worker_id,
            model=ready.model,
            device=settings.device,
            policy=settings.policy,
            telemetry=self.telemetry,
            attention_servers=self._server_stats(),
        )
        return worker_pb2.GetWorkerStatusResponse(
            status=status,
            context_tokens=ready.context_tokens,
            dtype=settings.dtype,
            ls_tokens_max=ready.ls_tokens_max,
            be_prompt_tokens_max=ready.be_prompt_tokens_max,
            draining=self._draining,
        )

    # --- internals -----------------------------------------------------------------------

    def _open(self, request: worker_pb2.WorkerServiceGenerateRequest) -> RequestLog:
        """Finds the log to resume, or checks and submits a new request."""
        known = self._logs.get(request.request_id)
        if known is not None and not known.is_for(request):
            raise RequestExistsError(
                f"request {known.request_id!r} has another prompt or tenant; choose another id",
                field="request_id",
            )
        if known is not None and known.generated_before != request.generated_tokens:
            self._drop(known)  # its tokens follow others than the caller's
            known = self._logs.get(request.request_id)
        if known is not None:
            if known.dropped:
                raise NoWorkerError(f"request {known.request_id} is ending here", retry_after_s=0.1)
            if request.resume_offset > len(known.tokens):
                raise InvalidArgumentError(
                    f"resume_offset {request.resume_offset} is beyond the "
                    f"{len(known.tokens)} tokens generated",
                    field="resume_offset",
                )
            return known
        if request.resume_offset:
            raise RequestNotFoundError(f"request {request.request_id} is not held here")
        if self._draining:
            raise DrainingError("worker is stopping", retry_after_s=1.0)
        if not self._ready.done():
            raise NoWorkerError("worker is starting", retry_after_s=1.0)
        self._check(request, self._ready.result())
        best_effort = request.service_class == types_pb2.SERVICE_CLASS_BEST_EFFORT
        interval_s = self._settings.be_stream_interval_s if best_effort else 0.0
        log = RequestLog(request, request.stream_interval_ms / 1e3 or interval_s)
        self._logs[request.request_id] = log
        now_ns = time.monotonic_ns()  # as the engine's clock
        try:
            self._channel.send(engine_pb2.EngineCommand(submit=request, sent_ns=now_ns))
        except NoWorkerError:
            del self._logs[request.request_id]
            raise
        return log

    def _check(
        self, request: worker_pb2.WorkerServiceGenerateRequest, ready: engine_pb2.EngineReady
    ) -> None:
        """Raises InvalidArgumentError naming the field that the engine could not serve."""
        prompt, sampling = len(request.prompt_token_ids), request.sampling
        if not request.request_id:
            raise InvalidArgumentError("request_id is empty", field="request_id")
        if not prompt:
            raise InvalidArgumentError("prompt is empty", field="prompt_token_ids")
        if max(request.prompt_token_ids) >= ready.vocabulary_tokens:
            raise InvalidArgumentError(
                f"token ids must be below {ready.vocabulary_tokens}", field="prompt_token_ids"
            )
        if sampling.max_tokens < 1:
            raise InvalidArgumentError("max_tokens must be >= 1", field="sampling.max_tokens")
        check_sampling(sampling)
        if request.generated_tokens >= prompt:
            raise InvalidArgumentError(
                "generated_tokens must be fewer than those of the prompt", field="generated_tokens"
            )
        best_effort = request.service_class == types_pb2.SERVICE_CLASS_BEST_EFFORT
        limit = ready.context_tokens if best_effort else ready.ls_tokens_max
        if prompt + sampling.max_tokens > limit:
            raise ContextLengthExceededError(
                f"prompt ({prompt}) + max_tokens ({sampling.max_tokens}) exceed {limit} tokens",
                field="sampling.max_tokens",
            )
        if best_effort and prompt > ready.be_prompt_tokens_max:
            raise ContextLengthExceededError(
                f"prompt ({prompt}) exceeds best-effort's device share of "
                f"{ready.be_prompt_tokens_max} tokens",
                field="prompt_token_ids",
            )

    def _expire_later(self, log: RequestLog) -> None:
        """Begins the orphan lease: if nobody comes back in time, the request goes."""
        if log.expiry is not None:
            log.expiry.cancel()
        loop = asyncio.get_running_loop()
        log.expiry = loop.call_later(self._settings.orphan_lease_s, self._drop, log)

    def _drop(self, log: RequestLog) -> None:
        """Forgets `log`, as soon as the engine has no request of its id any more."""
        if log.expiry is not None:  # it may not end the next log of this id
            log.expiry.cancel()
        if log.ended:
            del self._logs[log.request_id]
        elif not log.dropped:
            log.dropped = True
            try:
                self._channel.send(engine_pb2.EngineCommand(cancel=log.request_id))
            except NoWorkerError as error:
                _log.error("cancelling request %s failed: %s", log.request_id, error)
