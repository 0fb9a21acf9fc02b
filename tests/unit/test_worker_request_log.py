"""What readers of a request's tokens see, and when."""

from __future__ import annotations

import asyncio

from omniserve.gpuworker.request_log import RequestLog
from omniserve.v1 import types_pb2


def test_without_an_interval_a_token_is_released_at_once() -> None:
    log = RequestLog("r")
    log.append(7, None)
    assert log.released == 1


def test_with_an_interval_tokens_are_released_together() -> None:
    async def read() -> int:
        log = RequestLog("r", interval_s=0.01)
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
        log = RequestLog("r", interval_s=3600.0)
        log.append(7, None)
        log.end(types_pb2.FINISH_REASON_LENGTH)
        await log.wait_beyond(0)
        assert log.released == 1

    asyncio.run(read())


def test_a_log_that_holds_nothing_back_releases_at_once_what_it_has_and_gets() -> None:
    async def read() -> None:
        log = RequestLog("r", interval_s=3600.0)
        log.append(7, None)
        log.hold_nothing_back()
        assert log.released == 1
        log.append(8, None)
        assert log.released == 2

    asyncio.run(read())


def test_a_later_reader_gets_what_was_released_before() -> None:
    async def read() -> None:
        log = RequestLog("r", interval_s=0.01)
        log.append(7, None)
        await log.wait_beyond(0)
        log.append(8, None)
        await log.wait_beyond(0)
        assert log.released == 1
        await log.wait_beyond(1)
        assert log.released == 2

    asyncio.run(read())
