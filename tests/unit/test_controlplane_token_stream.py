"""What becomes of a stream whose worker, or whose channel, goes away under it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from omniserve.controlplane import token_stream
from omniserve.controlplane.router import Router, Worker
from omniserve.controlplane.token_stream import TokenStream, cancel_at
from omniserve.errors import NoWorkerError
from omniserve.internal.v1 import worker_pb2, worker_pb2_grpc
from omniserve.v1 import types_pb2

REQUEST = worker_pb2.WorkerServiceGenerateRequest(
    request_id="r", prompt_token_ids=[1, 2], sampling=types_pb2.SamplingParams(max_tokens=9)
)


class OneToken(worker_pb2_grpc.WorkerServiceServicer):
    """Sends a token, and then nothing more."""

    async def Generate(  # noqa: N802
        self,
        request: worker_pb2.WorkerServiceGenerateRequest,
        context: Any,  # noqa: ARG002
    ) -> AsyncIterator[worker_pb2.WorkerServiceGenerateResponse]:
        yield worker_pb2.WorkerServiceGenerateResponse(offset=request.resume_offset, token_ids=[7])
        await asyncio.sleep(3600)


@asynccontextmanager
async def serving(worker_id: str = "w0") -> AsyncIterator[Worker]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(OneToken(), server)
    port = server.add_insecure_port("localhost:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"localhost:{port}")
    stub = worker_pb2_grpc.WorkerServiceStub(channel)
    report = worker_pb2.GetWorkerStatusResponse()
    yield Worker(worker_id, "", channel, stub, report, 0.0, 0.0)
    await channel.close()
    await server.stop(None)


def run(test: Callable[[Worker], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with serving() as worker:
            await test(worker)

    asyncio.run(asyncio.wait_for(inside(), 30.0))


def stream_on(worker: Worker, patience_s: float = 0.2, **options: Any) -> TokenStream:
    router = Router(redis=None, model="m")  # which knows of no worker
    return TokenStream(
        router,
        worker,
        options.pop("request", REQUEST),
        cost=lambda _worker: 0.0,
        patience_s=patience_s,
        stop_tokens=frozenset(),
        **options,
    )


def test_a_channel_that_is_closed_under_a_stream_is_a_lost_worker() -> None:
    async def test(worker: Worker) -> None:
        stream = stream_on(worker)
        events = stream.events()
        assert (await anext(events)).token_ids == [7]
        closing = asyncio.ensure_future(worker.channel.close(0.0))
        with pytest.raises(NoWorkerError):  # it looked for another one, and was not cancelled
            await anext(events)
        await closing

    run(test)


def test_a_closed_channel_is_a_lost_worker_and_has_nothing_to_cancel() -> None:
    async def test(worker: Worker) -> None:
        await worker.channel.close()
        with pytest.raises(NoWorkerError):
            await anext(stream_on(worker).events())
        assert not await cancel_at(worker, "r")

    run(test)


def test_who_cancels_a_stream_s_task_cancels_it() -> None:
    async def test(worker: Worker) -> None:
        async def read() -> None:
            async for _ in stream_on(worker).events():
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(test)


def test_a_cancel_between_two_workers_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "RETRY_S", 0.3)

    async def test(worker: Worker) -> None:
        stream = stream_on(worker, patience_s=60.0)
        events = stream.events()
        await anext(events)
        await worker.channel.close()
        last = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.1)
        stream._router._workers["w0"] = worker  # it is back before the stream looks again
        assert await stream.cancel()
        assert (await last).finish_reason == types_pb2.FINISH_REASON_CANCELLED

    run(test)


def test_every_attempt_says_how_many_tokens_came_from_elsewhere() -> None:
    async def test(worker: Worker) -> None:
        resumed = worker_pb2.WorkerServiceGenerateRequest()
        resumed.CopyFrom(REQUEST)
        resumed.resume_offset = 5
        attempt = stream_on(worker, request=resumed, base=3)._worker_request()
        assert (attempt.generated_tokens, attempt.resume_offset) == (3, 2)

    run(test)


def test_a_lost_worker_is_not_tried_again_while_there_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_stream, "RETRY_S", 0.01)

    async def test(worker: Worker) -> None:
        placed: list[str] = []
        stream = stream_on(
            worker, patience_s=60.0, placed=lambda tried, _base: placed.append(tried.worker_id)
        )
        await worker.channel.close()
        async with serving("w1") as also_lost, serving("w2") as alive:
            await also_lost.channel.close()
            workers = {w.worker_id: w for w in (worker, also_lost, alive)}
            stream._router._workers.update(workers)
            assert (await anext(stream.events())).token_ids == [7]
        assert placed == ["w0", "w1", "w2"]

    run(test)


def test_a_cancel_before_the_first_attempt_sends_nothing() -> None:
    async def test(worker: Worker) -> None:
        stream = stream_on(worker)
        await stream.cancel()
        assert [t.finish_reason async for t in stream.events()] == [
            types_pb2.FINISH_REASON_CANCELLED
        ]

    run(test)
