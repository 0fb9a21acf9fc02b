"""Runs the items of the durable queue at the workers, a window of them at a time.

An item leaves the queue only with its result. Whatever dies on the way, this process, a worker
or Redis, the item is run again; its result counts once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from omniserve.controlplane.answer import AnswerText
from omniserve.controlplane.detokenizer import Piece
from omniserve.controlplane.inference import be_cost
from omniserve.controlplane.job_store import Entry, JobStore
from omniserve.controlplane.router import Router
from omniserve.controlplane.token_stream import TokenStream
from omniserve.controlplane.tokenizer import Tokenizer
from omniserve.errors import (
    InvalidArgumentError,
    NoWorkerError,
    OmniServeError,
    StoreUnavailableError,
)
from omniserve.v1 import jobs_pb2, types_pb2

log = logging.getLogger(__name__)

IDLE_S = 0.1
# Between two tries of an item that a worker refused for now, or of a write that Redis missed.
RETRY_S = 0.5


@dataclass(eq=False)
class Run:
    entry: Entry
    task: asyncio.Task[None] | None = None
    stream: TokenStream | None = None


class Dispatcher:
    def __init__(
        self,
        store: JobStore,
        router: Router,
        tokenizer: Tokenizer,
        *,
        window_items: int,
        stream_interval_s: float,
        renew_s: float,
        reclaim_s: float,
    ) -> None:
        self._store = store
        self._router = router
        self._tokenizer = tokenizer
        self._window_items = window_items
        self._stream_interval_ms = round(1e3 * stream_interval_s)
        self._renew_s = renew_s
        self._reclaim_s = reclaim_s
        self._consumer = uuid.uuid4().hex
        self._runs: dict[bytes, Run] = {}

    async def run(self) -> None:
        """Takes items while there is room, until cancelled; then hands back what it holds."""
        renewing = asyncio.create_task(self._keep_renewing())
        reclaimed_s = -math.inf
        try:
            while True:
                if renewing.done():
                    renewing.result()  # raises: without renewal others would take our items
                room = self._window_items - len(self._runs)
                if room <= 0 or not self._router.workers:
                    await asyncio.sleep(IDLE_S)
                    continue
                try:
                    if time.monotonic() - reclaimed_s > self._reclaim_s / 2:
                        self._start(
                            await self._store.reclaim(self._consumer, self._reclaim_s, room)
                        )
                        reclaimed_s = time.monotonic()
                    else:
                        self._start(await self._store.take(self._consumer, room))
                except StoreUnavailableError as error:
                    log.info("job queue: %s", error.message)
                    await asyncio.sleep(RETRY_S)
        finally:
            renewing.cancel()
            await self._hand_back()

    async def drop(self) -> None:
        """Ends the runs of items that are no longer to be done, and renews the others."""
        held = list(self._runs)
        wanted = await self._store.renew(self._consumer, held)
        dropped = [self._runs[i] for i in held if i not in wanted and i in self._runs]
        for run in dropped:
            if run.task is not None:
                run.task.cancel()
        await asyncio.gather(*(run.stream.cancel() for run in dropped if run.stream))

    def _start(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.entry_id in self._runs:
                continue
            run = self._runs[entry.entry_id] = Run(entry)
            run.task = asyncio.create_task(self._run(run))

    async def _run(self, run: Run) -> None:
        try:
            result = await self._result(run)
            while True:
                try:
                    await self._store.finish(run.entry, result)
                    return
                except StoreUnavailableError as error:
                    log.warning("%s not stored: %s", run.entry.request.request_id, error.message)
                    await asyncio.sleep(RETRY_S)
        finally:
            del self._runs[run.entry.entry_id]

    async def _result(self, run: Run) -> jobs_pb2.JobResult:
        while True:
            try:
                return await self._generate(run)
            except OmniServeError as error:
                log.info("%s: %s", run.entry.request.request_id, error.message)
                # What a worker generated became part of the prompt for the next one: if that is
                # refused, the item as it was submitted need not be.
                moved = run.stream is not None and run.stream.base > 0
                refused = isinstance(error, InvalidArgumentError) and not moved
                if refused or type(error) is OmniServeError:
                    # "Not this item", or a bug that would strike again: all others mean "not now".
                    return self._failed(run.entry, error.message)
                await asyncio.sleep(RETRY_S)

    async def _generate(self, run: Run) -> jobs_pb2.JobResult:
        request = run.entry.request
        # Until it ends only a stop string makes a difference, and only we would see it.
        request.stream_interval_ms = 0 if request.sampling.stop else self._stream_interval_ms
        stream = TokenStream(
            self._router,
            self._router.pick(be_cost),
            request,
            cost=be_cost,
            patience_s=math.inf,
            stop_tokens=self._tokenizer.stop_tokens,
        )
        run.stream = stream
        answer = AnswerText(self._tokenizer.detokenizer(), request.sampling.stop)
        pieces: list[Piece] = []
        logprobs: list[types_pb2.TokenLogprobs] = []
        reason = types_pb2.FINISH_REASON_UNSPECIFIED
        cached_tokens = 0
        async with aclosing(stream.events()) as events:
            async for event in events:
                pieces.append(answer.push(event.token_ids))
                logprobs += event.logprobs
                reason = event.finish_reason
                cached_tokens = event.cached_tokens
                if answer.stopped and not reason:
                    await stream.cancel()  # only we know that it is complete
                    break
        if reason == types_pb2.FINISH_REASON_ERROR:
            return self._failed(run.entry, "the worker could not complete it")
        if reason == types_pb2.FINISH_REASON_CANCELLED:
            # Nobody cancels a job's item but us: the worker let it go, so it runs again.
            raise NoWorkerError("the worker dropped it")
        prompt_tokens = len(request.prompt_token_ids)
        pieces.append(answer.flush())
        token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
        return jobs_pb2.JobResult(
            custom_id=run.entry.custom_id,
            reason=types_pb2.FINISH_REASON_STOP if answer.stopped else reason,
            text="".join(piece.text for piece in pieces),
            token_ids=token_ids,
            usage=types_pb2.Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=len(token_ids),
                cached_tokens=min(cached_tokens, prompt_tokens),
            ),
            logprobs=logprobs[: len(token_ids)],
        )

    def _failed(self, entry: Entry, error: str) -> jobs_pb2.JobResult:
        return jobs_pb2.JobResult(
            custom_id=entry.custom_id, reason=types_pb2.FINISH_REASON_ERROR, error=error
        )

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self._renew_s)
            try:
                await self.drop()
            except StoreUnavailableError as error:
                log.info("job queue: %s", error.message)

    async def _hand_back(self) -> None:
        runs = list(self._runs.values())
        tasks = [run.task for run in runs if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(StoreUnavailableError):
            await self._store.release(self._consumer, [run.entry.entry_id for run in runs])
