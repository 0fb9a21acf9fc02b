"""What readers of a request's tokens see, and when."""

from __future__ import annotations

import asyncio

import pytest

from omniserve.gpuworker.request_log import TOKENS_PER_MESSAGE, RequestLog
from omniserve.internal.v1 import worker_pb2
from omniserve.v1 import types_pb2


def request(
    prompt: tuple[int, ...] = (1, 2, 3), tenant: str = "", generated: int = 0
) -> worker_pb2.WorkerServiceGenerateRequest:
    return worker_pb2.WorkerServiceGenerateRequest(
        request_id="r", prompt_token_ids=prompt, tenant=tenant, generated_tokens=generated
    )


def test_without_an_interval_a_token_is_released_at_once() -> None:
    log = RequestLog(request())
    log.append(7, None)
    assert log.released == 1


def test_with_an_interval_tokens_are_released_together() -> None:
    async def read() -> int:
        log = RequestLog(request(), interval_s=0.3)
        reader = asyncio.create_task(log.wait_beyond(0))
        for token in range(5):
            log.append(token, None)
            await asyncio.sleep(0)
        assert not reader.done()
        await reader
        return log.released

    assert asyncio.run(read()) == 5


def test_the_end_releases_what_has_gathered() -> None:
    async def read() -> None:
        log = RequestLog(request(), interval_s=3600.0)
        log.append(7, None)
        log.end(types_pb2.FINISH_REASON_LENGTH)
        await log.wait_beyond(0)
        assert log.released == 1

    asyncio.run(read())


def test_what_has_gathered_can_be_released_before_its_time() -> None:
    async def read() -> None:
        log = RequestLog(request(), interval_s=3600.0)
        log.append(7, None)
        log.release()
        await log.wait_beyond(0)
        log.append(8, None)
        assert log.released == 1

    asyncio.run(read())


def test_a_later_reader_gets_what_was_released_before() -> None:
    async def read() -> None:
        log = RequestLog(request(), interval_s=0.01)
        log.append(7, None)
        await log.wait_beyond(0)
        log.append(8, None)
        await log.wait_beyond(0)
        assert log.released == 1
        await log.wait_beyond(1)
        assert log.released == 2

    asyncio.run(read())


def test_messages_are_bounded_and_have_released_tokens_only() -> None:
    async def read() -> None:
        log = RequestLog(request(), interval_s=3600.0)
        for token in range(TOKENS_PER_MESSAGE + 2):
            log.append(token, types_pb2.TokenLogprobs(logprob=-float(token)))
        assert not log.message(0).token_ids
        log.release()
        log.append(7, types_pb2.TokenLogprobs())
        first, last = log.message(0), log.message(TOKENS_PER_MESSAGE)
        assert first.token_ids == list(range(TOKENS_PER_MESSAGE))
        assert len(first.logprobs) == TOKENS_PER_MESSAGE
        assert last.offset == TOKENS_PER_MESSAGE
        assert last.token_ids == [TOKENS_PER_MESSAGE, TOKENS_PER_MESSAGE + 1]
        assert last.logprobs[0].logprob == -TOKENS_PER_MESSAGE

    asyncio.run(read())


@pytest.mark.parametrize(
    ("asked", "same"),
    [
        (request((1, 2, 3, 8, 9), generated=2), True),
        (request((1, 2, 3), generated=2), True),  # resumed by a client, who knows the prompt only
        (request((1, 2, 4), generated=2), False),
        (request((1, 2, 3, 8), generated=2), False),
        (request((1, 2), generated=2), False),
        (request((1, 2, 3), tenant="other", generated=2), False),
    ],
)
def test_a_log_is_for_its_own_tenant_and_prompt_alone(
    asked: worker_pb2.WorkerServiceGenerateRequest, same: bool
) -> None:
    assert RequestLog(request((1, 2, 3, 8, 9), generated=2)).is_for(asked) == same
