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
from omniserve.controlplane.detokenizer import Piece
from omniserve.controlplane.limits_loop import LimitsView
from omniserve.controlplane.placements import Placement, Placements
from omniserve.controlplane.router import Router, Worker
from omniserve.controlplane.rpc_errors import typed_errors
from omniserve.controlplane.settings import Settings
from omniserve.controlplane.slo_state import SloState, Timing
from omniserve.controlplane.token_stream import TokenStream, cancel_at
from omniserve.controlplane.validator import Validator
from omniserve.errors import (
    QueueFullError,
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
        placement = await self._find(request)
        work.request_id = work.request_id or uuid.uuid4().hex
        if work.service_class == types_pb2.SERVICE_CLASS_BEST_EFFORT:
            with self._be_slot():
                await self._serve(work, placement, be_cost, context, lambda _count: None)
            return
        timing = Timing(started_s, work.slo.ttft_ms, work.slo.tpot_ms)
        with self._judged(timing, resumed=request.resume_offset > 0):
            await self._serve_ls(work, placement, timing, context)

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
        context_tokens = self.validator.context_tokens()
        model = inference_pb2.Model(id=self.settings.model, context_tokens=context_tokens)
        for worker in self.router.workers:
            model.dtype, model.device = worker.report.dtype, worker.report.status.device
        return inference_pb2.ListModelsResponse(models=[model])

    async def _find(self, request: inference_pb2.GenerateRequest) -> Placement | None:
        """Where a request that may be running already is, if it is anywhere."""
        if not request.request_id:
            return None
        try:
            placement = await self.placements.get(request.request_id)
        except StoreUnavailableError:
            if request.resume_offset:
                raise
            return None
        if placement is not None and self.router.find(placement.worker_id) is None:
            placement = None
        if request.resume_offset and (placement is None or request.resume_offset <= placement.base):
            raise RequestNotFoundError(
                f"no worker has request {request.request_id!r} from token "
                f"{request.resume_offset} on",
                field="request_id",
            )
        return placement

    async def _serve_ls(
        self,
        work: worker_pb2.WorkerServiceGenerateRequest,
        placement: Placement | None,
        timing: Timing,
        context: Any,
    ) -> None:
        prompt_tokens = len(work.prompt_token_ids)
        running_max = self.view.limits.ls_running_max

        def cost(worker: Worker) -> float:
            return predict_ttft_ms(worker.load(running_max), prompt_tokens)

        if placement is not None:
            await self._serve(work, placement, cost, context, timing.tokens_now)
            return
        worker = self.router.pick(cost)
        load = worker.load(running_max)
        verdict = admit(load, prompt_tokens, work.slo.ttft_ms, self.settings.ls_waiting_max)
        if not verdict.admitted:
            raise SloUnattainableError(
                verdict.reason,
                retry_after_s=verdict.retry_after_s,
                metadata={"predicted_ttft_ms": f"{verdict.predicted_ttft_ms:.0f}"},
            )
        with self.router.prefilling(worker, prompt_tokens) as answered:

            def on_tokens(count: int) -> None:
                answered()
                timing.tokens_now(count)

            await self._serve(work, Placement(worker.worker_id, 0), cost, context, on_tokens)

    async def _serve(
        self,
        work: worker_pb2.WorkerServiceGenerateRequest,
        placement: Placement | None,
        cost: Callable[[Worker], float],
        context: Any,
        on_tokens: Callable[[int], None],
    ) -> None:
        """Streams `work`, from where it is if it is anywhere, else from the cheapest worker."""
        worker = self.router.find(placement.worker_id) if placement else None
        stream = TokenStream(
            self.router,
            worker or self.router.pick(cost),
            work,
            cost=cost,
            patience_s=self.settings.failover_s,
            stop_tokens=self.validator.tokenizer.stop_tokens,
            base=placement.base if placement and worker else 0,
            timeout_s=context.time_remaining(),
            placed=lambda worker, base: self.placements.put(
                work.request_id, Placement(worker.worker_id, base)
            ),
        )
        self._running[work.request_id] = stream
        try:
            await self._forward(stream, work, context, on_tokens)
        finally:
            if self._running.get(work.request_id) is stream:
                del self._running[work.request_id]

    async def _forward(
        self,
        stream: TokenStream,
        work: worker_pb2.WorkerServiceGenerateRequest,
        context: Any,
        on_tokens: Callable[[int], None],
    ) -> None:
        detokenizer = self.validator.tokenizer.detokenizer()
        sent = stream.offset

        async def send(piece: Piece) -> None:
            nonlocal sent
            if piece.token_ids:
                chunk = inference_pb2.Chunk(offset=sent, token_ids=piece.token_ids, text=piece.text)
                sent += len(piece.token_ids)
                await context.write(
                    inference_pb2.GenerateResponse(request_id=work.request_id, chunk=chunk)
                )

        async with aclosing(stream.events()) as events:
            async for event in events:
                if event.token_ids:
                    on_tokens(len(event.token_ids))
                await send(detokenizer.push(event.token_ids))
                if event.finish_reason:
                    await send(detokenizer.flush())
                    usage = types_pb2.Usage(
                        prompt_tokens=len(work.prompt_token_ids), completion_tokens=stream.offset
                    )
                    finished = inference_pb2.Finished(reason=event.finish_reason, usage=usage)
                    await context.write(
                        inference_pb2.GenerateResponse(
                            request_id=work.request_id, finished=finished
                        )
                    )

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
    def _judged(self, timing: Timing, *, resumed: bool) -> Iterator[None]:
        """Records whether the request met its SLO; a resumed one was judged where it began."""
        try:
            yield
        except asyncio.CancelledError:
            # A caller who gave up after the SLO had passed saw a miss; before, nothing is known.
            if not resumed and timing.missed_by(time.monotonic()):
                self.slo_state.record(met=False)
            raise
        except Exception:
            if not resumed:
                self.slo_state.record(met=False)
            raise
        if not resumed:
            self.slo_state.record(met=timing.met())


def be_cost(worker: Worker) -> float:
    return worker.be_in_flight + worker.telemetry.be_waiting
