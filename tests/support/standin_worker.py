"""A worker without a model, for tests of the control plane: the real contract, made-up tokens.

A token depends on all tokens before it, so a stream that lost or repeated one ends differently.
Requests outlive broken calls, as a worker's do during its orphan lease. As many tokens of a prompt
are cached as its tenant's name has letters. Tokens are sent at once, but stderr tells how often
each call wanted them.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import redis.asyncio

from omniserve import keys
from omniserve.errors import InvalidArgumentError, RequestNotFoundError
from omniserve.internal.v1 import worker_pb2, worker_pb2_grpc
from omniserve.rpc import abort_aio
from omniserve.v1 import status_pb2, types_pb2

HEARTBEAT_S = 0.1
# A prompt that starts with this token is refused, one with the other never gets a token.
REFUSED_TOKEN = 16
STUCK_TOKEN = 15


def next_token(sequence: Sequence[int]) -> int:
    value = 7
    for token in sequence:
        value = (value * 31 + token + 1) % 1_000_003
    return 1000 + value % 20_000


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(next_token(sequence))
    return sequence[len(prompt) :]


class Running:
    def __init__(self, request: worker_pb2.WorkerServiceGenerateRequest, token_s: float) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.reason = types_pb2.FINISH_REASON_UNSPECIFIED
        self.changed = asyncio.Condition()
        self.task = asyncio.create_task(self._generate(token_s))

    async def _generate(self, token_s: float) -> None:
        sequence = list(self.request.prompt_token_ids)
        if sequence[0] == STUCK_TOKEN:
            return
        for _ in range(self.request.sampling.max_tokens):
            await asyncio.sleep(token_s)
            self.tokens.append(next_token(sequence + self.tokens))
            async with self.changed:
                self.changed.notify_all()
        await self.end(types_pb2.FINISH_REASON_LENGTH)

    def logprobs(self, offset: int) -> list[types_pb2.TokenLogprobs]:
        """If asked for: a token's is less the number of tokens generated before it, anywhere."""
        if not self.request.sampling.logprobs:
            return []
        before = range(offset, len(self.tokens))
        generated = self.request.generated_tokens
        return [types_pb2.TokenLogprobs(logprob=-(generated + index)) for index in before]

    async def end(self, reason: types_pb2.FinishReason) -> None:
        if not self.reason:
            self.reason = reason
        async with self.changed:
            self.changed.notify_all()


class StandinWorker(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.held: dict[str, Running] = {}
        self.limits = status_pb2.Limits()

    async def Generate(  # noqa: N802
        self, request: worker_pb2.WorkerServiceGenerateRequest, context: Any
    ) -> AsyncIterator[worker_pb2.WorkerServiceGenerateResponse]:
        wanted = f"{request.request_id} every {request.stream_interval_ms} ms"
        print(wanted, file=sys.stderr, flush=True)
        if request.prompt_token_ids[0] == REFUSED_TOKEN:
            await abort_aio(context, InvalidArgumentError("refused token", field="token_ids.ids"))
        if len(request.prompt_token_ids) > self.options.prompt_tokens_max:
            await abort_aio(context, InvalidArgumentError("too long", field="prompt_token_ids"))
        running = self.held.get(request.request_id)
        if running is None:
            if request.resume_offset:
                await abort_aio(context, RequestNotFoundError("not held"))
            running = self.held[request.request_id] = Running(request, self.options.token_s)
        sent = request.resume_offset
        while True:
            async with running.changed:
                while len(running.tokens) <= sent and not running.reason:
                    await running.changed.wait()
            fresh = running.tokens[sent:]
            if fresh:
                yield worker_pb2.WorkerServiceGenerateResponse(
                    offset=sent, token_ids=fresh, logprobs=running.logprobs(sent)
                )
                sent += len(fresh)
            if running.reason and sent == len(running.tokens):
                break
        yield worker_pb2.WorkerServiceGenerateResponse(
            offset=sent,
            finish_reason=running.reason,
            cached_tokens=len(running.request.tenant),
        )

    async def Cancel(  # noqa: N802
        self, request: worker_pb2.WorkerServiceCancelRequest, _context: Any
    ) -> worker_pb2.WorkerServiceCancelResponse:
        running = self.held.get(request.request_id)
        if running is None or running.reason:
            return worker_pb2.WorkerServiceCancelResponse(cancelled=False)
        running.task.cancel()
        await running.end(types_pb2.FINISH_REASON_CANCELLED)
        return worker_pb2.WorkerServiceCancelResponse(cancelled=True)

    async def SetLimits(  # noqa: N802
        self, request: worker_pb2.SetLimitsRequest, _context: Any
    ) -> worker_pb2.SetLimitsResponse:
        self.limits = request.limits
        return worker_pb2.SetLimitsResponse()

    def report(self) -> worker_pb2.GetWorkerStatusResponse:
        """`policy` tells the limits, `passes` the requests begun, `be_waiting` those running."""
        running = [r for r in self.held.values() if not r.reason]
        telemetry = status_pb2.Telemetry(
            passes=len(self.held),
            be_waiting=len(running),
            ls_running=self.options.ls_running,
            prefill_token_ms=self.options.prefill_token_ms,
            decode_pass_ms=self.options.decode_pass_ms,
        )
        status = status_pb2.WorkerStatus(
            worker_id=self.options.worker_id,
            model="SmolLM2-135M-Instruct",
            device="stand-in",
            policy=f"{self.limits.be_rows_per_stage} rows",
            telemetry=telemetry,
        )
        return worker_pb2.GetWorkerStatusResponse(
            status=status,
            context_tokens=8192,
            dtype="float32",
            ls_tokens_max=6000,
            be_prompt_tokens_max=3000,
        )

    async def GetWorkerStatus(  # noqa: N802
        self, _request: worker_pb2.GetWorkerStatusRequest, _context: Any
    ) -> worker_pb2.GetWorkerStatusResponse:
        return self.report()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--worker-id", default="standin")
    parser.add_argument("--token-s", type=float, default=0.002)
    parser.add_argument("--prompt-tokens-max", type=int, default=8192)
    parser.add_argument("--ls-running", type=int, default=0)
    parser.add_argument("--prefill-token-ms", type=float, default=0.1)
    parser.add_argument("--decode-pass-ms", type=float, default=1.0)
    options = parser.parse_args()
    worker = StandinWorker(options)
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
    server.add_insecure_port(options.listen)
    await server.start()
    client = redis.asyncio.from_url(options.redis_url, socket_timeout=1.0)
    while True:
        status = base64.b64encode(worker.report().SerializeToString()).decode()
        value = json.dumps({"address": options.listen, "status": status})
        # Redis is down in some tests.
        with contextlib.suppress(redis.exceptions.RedisError, OSError):
            await client.set(keys.worker(options.worker_id), value, px=4000)
        await asyncio.sleep(HEARTBEAT_S)


if __name__ == "__main__":
    asyncio.run(main())
