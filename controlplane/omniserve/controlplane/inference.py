"""InferenceService: admits requests and streams their tokens as text."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from omniserve.controlplane import prompts
from omniserve.controlplane.admission import admit, predict_ttft_ms
from omniserve.controlplane.answer import AnswerText
from omniserve.controlplane.limits_loop import LimitsView
from omniserve.controlplane.placements import Placement, Placements
from omniserve.controlplane.response_writer import ResponseWriter
from omniserve.controlplane.router import Router, Worker
from omniserve.controlplane.rpc_errors import typed_errors
from omniserve.controlplane.settings import Settings
from omniserve.controlplane.slo_state import SloState, Timing
from omniserve.controlplane.token_stream import Tokens, TokenStream, cancel_at
from omniserve.controlplane.validator import Validator
from omniserve.errors import (
    QueueFullError,
    RequestExistsError,
    RequestNotFoundError,
    SloUnattainableError,
    StoreUnavailableError,
)
from omniserve.internal.v1 import worker_pb2
from omniserve.v1 import inference_pb2, inference_pb2_grpc, types_pb2


@dataclass
class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    settings: Settings
    validator: Validator
    router: Router
    placements: Placements
    slo_state: SloState
    view: LimitsView
    _running: dict[str, TokenStream] = field(default_factory=dict)
    _be_in_flight: int = 0

    @typed_errors
    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        started_s = time.monotonic()
        work = await self.validator.generate(request)
        worker, base = await self._find(request)
        work.request_id = work.request_id or uuid.uuid4().hex
        if work.service_class == types_pb2.SERVICE_CLASS_BEST_EFFORT:
            with self._be_slot():
                worker = worker or self.router.pick(be_cost)
                await self._serve(work, worker, base, be_cost, context, lambda _tokens: None)
        elif worker is not None and request.resume_offset:  # admitted and judged where it began
            cost = self._ls_cost(work)
            await self._serve(work, worker, base, cost, context, lambda _tokens: None)
        else:
            timing = Timing(started_s, work.slo.ttft_ms, work.slo.tpot_ms)
            with self._judged(timing):
                await self._serve_new_ls(work, worker, timing, context)

    @typed_errors
    async def Cancel(  # noqa: N802
        self, request: inference_pb2.CancelRequest, _context: Any
    ) -> inference_pb2.CancelResponse:
        prompts.check_id(request.request_id, "request_id", prompts.REQUEST_ID_CHARS)
        running = self._running.get(request.request_id)
        if running is not None:
            return inference_pb2.CancelResponse(cancelled=await running.cancel())
        try:
            placement = await self.placements.get(request.request_id)
            worker = self.router.find(placement.worker_id) if placement else None
            workers = [worker] if worker else []
        except StoreUnavailableError:
            workers = self.router.workers
        answers = [await cancel_at(worker, request.request_id) for worker in workers]
        return inference_pb2.CancelResponse(cancelled=any(answers))

    @typed_errors
    async def ListModels(  # noqa: N802
        self, _request: inference_pb2.ListModelsRequest, _context: Any
    ) -> inference_pb2.ListModelsResponse:
        context_tokens = self.validator.capacity().context_tokens
        model = inference_pb2.Model(id=self.settings.model, context_tokens=context_tokens)
        for worker in self.router.workers:
            model.dtype, model.device = worker.report.dtype, worker.report.status.device
        return inference_pb2.ListModelsResponse(models=[model])

    async def _find(self, request: inference_pb2.GenerateRequest) -> tuple[Worker | None, int]:
        """Returns the worker that may have the request already, and its Placement.base.

        A repeated id without an offset goes there too, as its caller may have missed the answer.
        """
        # A new request must not wait for Redis to time out.
        if not request.request_id or not (request.resume_offset or self.router.redis_reachable):
            return None, 0
        try:
            placement = await self.placements.get(request.request_id)
        except StoreUnavailableError:
            if request.resume_offset:
                raise
            return None, 0
        worker = self.router.find(placement.worker_id) if placement else None
        base = placement.base if placement and worker else 0
        if base and not request.resume_offset:
            raise RequestExistsError(
                f"request {request.request_id!r} runs or ended lately; resume it or choose "
                "another id",
                field="request_id",
            )
        if request.resume_offset and (worker is None or request.resume_offset <= base):
            raise RequestNotFoundError(
                f"no worker has request {request.request_id!r} from token "
                f"{request.resume_offset} on",
                field="request_id",
            )
        return worker, base

    def _ls_cost(self, work: worker_pb2.WorkerServiceGenerateRequest) -> Callable[[Worker], float]:
        running_max = self.view.limits.ls_running_max
        prompt_tokens = len(work.prompt_token_ids)
        return lambda worker: predict_ttft_ms(worker.load(running_max), prompt_tokens)

    async def _serve_new_ls(
        self,
        work: worker_pb2.WorkerServiceGenerateRequest,
        worker: Worker | None,
        timing: Timing,
        context: Any,
    ) -> None:
        cost = self._ls_cost(work)
        prompt_tokens = len(work.prompt_token_ids)
        worker = worker or self.router.pick(cost)
        load = worker.load(self.view.limits.ls_running_max)
        verdict = admit(load, prompt_tokens, work.slo.ttft_ms, self.settings.ls_waiting_max)
        if not verdict.admitted:
            raise SloUnattainableError(
                verdict.reason,
                retry_after_s=verdict.retry_after_s,
                metadata={"predicted_ttft_ms": f"{verdict.predicted_ttft_ms:.0f}"},
            )
        with self.router.prefilling(worker, prompt_tokens) as answered:

            def on_tokens(tokens: Tokens) -> None:
                answered()
                timing.failed = tokens.finish_reason == types_pb2.FINISH_REASON_ERROR
                if tokens.token_ids:
                    timing.tokens_at(time.monotonic(), len(tokens.token_ids))

            await self._serve(work, worker, 0, cost, context, on_tokens)

    async def _serve(
        self,
        work: worker_pb2.WorkerServiceGenerateRequest,
        worker: Worker,
        base: int,
        cost: Callable[[Worker], float],
        context: Any,
        on_tokens: Callable[[Tokens], None],
    ) -> None:
        """Streams `work` from `worker`, or from others by `cost` once that is lost."""
        stream = TokenStream(
            self.router,
            worker,
            work,
            cost=cost,
            patience_s=self.settings.failover_s,
            stop_tokens=self.validator.tokenizer.stop_tokens,
            base=base,
            timeout_s=context.time_remaining(),
            placed=lambda worker, base: self.placements.put(
                work.request_id, Placement(worker.worker_id, base)
            ),
        )
        self._running[work.request_id] = stream
        try:
            writer = ResponseWriter(
                context,
                AnswerText(self.validator.tokenizer.detokenizer(), work.sampling.stop),
                work.request_id,
                len(work.prompt_token_ids),
                stream.offset,
            )
            reason = types_pb2.FINISH_REASON_UNSPECIFIED
            async with aclosing(stream.events()) as events:
                async for tokens in events:
                    on_tokens(tokens)
                    await writer.write(tokens)
                    reason = tokens.finish_reason
                    if writer.stopped and not reason:
                        await stream.cancel()  # only we know that it is complete
                        break
            await writer.finish(reason)
        finally:
            if self._running.get(work.request_id) is stream:
                del self._running[work.request_id]

    @contextmanager
    def _be_slot(self) -> Iterator[None]:
        if self._be_in_flight >= self.settings.be_generate_max:
            raise QueueFullError(
                f"{self._be_in_flight} best-effort requests are in flight; submit a job instead",
                retry_after_s=1.0,
            )
        self._be_in_flight += 1
        try:
            yield
        finally:
            self._be_in_flight -= 1

    @contextmanager
    def _judged(self, timing: Timing) -> Iterator[None]:
        """Records whether a request met its SLO; refused or failed, it did not."""
        try:
            yield
        except asyncio.CancelledError:
            # A caller who gave up after the SLO had passed saw a miss; before, nothing is known.
            if timing.missed_by(time.monotonic()):
                self.slo_state.record(met=False)
            raise
        except RequestExistsError:  # of the caller's making
            raise
        except Exception:
            self.slo_state.record(met=False)
            raise
        self.slo_state.record(met=timing.met())


def be_cost(worker: Worker) -> float:
    return worker.be_in_flight + worker.telemetry.be_waiting
