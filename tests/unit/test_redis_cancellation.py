"""A task that calls Redis ends when it is cancelled, whenever that is."""

from __future__ import annotations

import asyncio

from omniserve import redis_access


def test_a_cancellation_that_comes_with_an_answer_is_not_lost() -> None:
    async def call_for_ever(answers: list[asyncio.Future[None]]) -> None:
        while True:
            answers.append(asyncio.get_running_loop().create_future())
            await asyncio.wait_for(answers[-1], 60)  # as the client library does
            redis_access.raise_if_cancelled()

    async def cancel_as_an_answer_comes() -> bool:
        answers: list[asyncio.Future[None]] = []
        task = asyncio.create_task(call_for_ever(answers))
        await asyncio.sleep(0.01)
        answers[-1].set_result(None)
        task.cancel()
        await asyncio.wait([task], timeout=1)
        return task.cancelled()

    assert asyncio.run(cancel_as_an_answer_comes())
