"""Sends requests to a worker's gRPC front at given times and records what comes back.

One asyncio loop for all streams. Prompts are random token ids, so that no two share a prefix, and
run to their last token whatever is sampled.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from omniserve.client.bench.metrics import (
    Outcome,
    RequestRecord,
    attainment,
    percentile,
    tpots_ms,
    ttfts_ms,
)
from omniserve.internal.v1 import worker_pb2, worker_pb2_grpc
from omniserve.v1 import types_pb2

# Ordinary tokens of every vocabulary that we serve: no control tokens, which come first.
_TOKEN_IDS = (1000, 32000)


@dataclass(frozen=True)
class Arrival:
    """One request to send, `at_s` after the load's start."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    best_effort: bool = False


@dataclass(frozen=True)
class Slo:
    """Objective of the latency-sensitive requests."""

    ttft_ms: float
    tpot_ms: float


BE_STREAM_INTERVAL_MS = 10_000
"""As the control plane asks for the items of jobs."""
NO_HURRY = Slo(ttft_ms=3_600_000, tpot_ms=60_000)
"""For LS requests of which only the throughput counts."""


@dataclass
class Sent:
    """A request and what became of it."""

    arrival: Arrival
    record: RequestRecord = field(default_factory=lambda: RequestRecord(0.0))


class Load:
    """One client's streams to one worker."""

    def __init__(self, address: str, slo: Slo, seed: int) -> None:
        self._address = address
        self._slo = slo
        self._rng = np.random.default_rng(seed)

    def run(self, arrivals: Sequence[Arrival]) -> list[Sent]:
        """Sends `arrivals`; returns when all have ended."""
        return asyncio.run(self._run_beside(arrivals, (), 0.0))[0]

    def run_beside(
        self, arrivals: Sequence[Arrival], backlog: Sequence[Arrival], at_least_s: float = 0.0
    ) -> tuple[list[Sent], list[Sent]]:
        """Sends both; when `arrivals` have ended, and `at_least_s` is over, cancels `backlog`."""
        return asyncio.run(self._run_beside(arrivals, backlog, at_least_s))

    async def _run_beside(
        self, arrivals: Sequence[Arrival], backlog: Sequence[Arrival], at_least_s: float
    ) -> tuple[list[Sent], list[Sent]]:
        async with grpc.aio.insecure_channel(self._address) as channel:
            sent, tasks = self._send_all(channel, arrivals)
            beside, beside_tasks = self._send_all(channel, backlog)
            await asyncio.gather(*tasks, asyncio.sleep(at_least_s))
            await _cancel(beside_tasks)
        return sent, beside

    def _send_all(
        self, channel: grpc.aio.Channel, arrivals: Sequence[Arrival]
    ) -> tuple[list[Sent], list[asyncio.Task[None]]]:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        sent = [Sent(arrival) for arrival in arrivals]
        prompts = [self._rng.integers(*_TOKEN_IDS, a.prompt_tokens).tolist() for a in arrivals]
        start_s = time.perf_counter()
        tasks = []
        for one, prompt in zip(sent, prompts, strict=True):
            one.record.due_s = start_s + one.arrival.at_s
            tasks.append(asyncio.create_task(self._send(stub, one, prompt)))
        return sent, tasks

    async def _send(
        self, stub: worker_pb2_grpc.WorkerServiceStub, sent: Sent, prompt: list[int]
    ) -> None:
        arrival, record = sent.arrival, sent.record
        request = self._request(arrival, prompt)
        await asyncio.sleep(record.due_s - time.perf_counter())
        try:
            async for message in stub.Generate(request):
                record.token_times_s += [time.perf_counter()] * len(message.token_ids)
            whole = len(record.token_times_s) == arrival.output_tokens
            record.outcome = Outcome.COMPLETED if whole else Outcome.FAILED
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED:
                return  # by us, before the call was under way
            refused = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            record.outcome = Outcome.REFUSED if refused else Outcome.FAILED

    def _request(
        self, arrival: Arrival, prompt: list[int]
    ) -> worker_pb2.WorkerServiceGenerateRequest:
        latency_sensitive = types_pb2.SERVICE_CLASS_LATENCY_SENSITIVE
        best_effort = types_pb2.SERVICE_CLASS_BEST_EFFORT
        return worker_pb2.WorkerServiceGenerateRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt,
            service_class=best_effort if arrival.best_effort else latency_sensitive,
            sampling=types_pb2.SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True),
            slo=types_pb2.Slo(ttft_ms=self._slo.ttft_ms, tpot_ms=self._slo.tpot_ms),
            stream_interval_ms=BE_STREAM_INTERVAL_MS if arrival.best_effort else 0,
        )


def tokens_per_s(sent: Sequence[Sent]) -> float:
    """Output tokens of all requests over their `makespan_s`."""
    return sum(len(s.record.token_times_s) for s in sent) / makespan_s(sent)


def makespan_s(sent: Sequence[Sent]) -> float:
    """From the first sending to the last token. Raises RuntimeError unless all completed."""
    bad = [s for s in sent if s.record.outcome is not Outcome.COMPLETED]
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(sent)} requests did not complete: {bad[0]}")
    start_s = min(s.record.due_s for s in sent)
    return max(s.record.token_times_s[-1] for s in sent) - start_s


def ls_figures(sent: Sequence[Sent], slo: Slo) -> dict[str, Any]:
    """Attainment and latencies of LS requests, under the names that the reports share."""
    records = [s.record for s in sent]
    share = attainment(records, slo.ttft_ms, slo.tpot_ms)
    return {
        "ls_attainment": round(share, 4) if share is not None else None,
        "ls_requests": len(records),
        "ls_ttft_p99_ms": _rounded(percentile(ttfts_ms(records), 99)),
        "ls_tpot_p99_ms": _rounded(percentile(tpots_ms(records), 99)),
    }


def _rounded(milliseconds: float | None) -> float | None:
    return round(milliseconds, 2) if milliseconds is not None else None


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Ends what still runs: a broken stream ends its request when its orphan lease is over."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
