"""Which workers a control plane takes for alive, by what Redis says and while it says nothing."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis.asyncio
from support.stack import Stack

from omniserve import keys
from omniserve.controlplane.router import MISSING_GRACE_S, Router
from omniserve.internal.v1 import worker_pb2
from omniserve.v1 import status_pb2

STATUS = worker_pb2.GetWorkerStatusResponse(
    status=status_pb2.WorkerStatus(worker_id="w0", model="m")
)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with Stack(tmp_path) as stack:
        yield stack


def beat(stack: Stack) -> None:
    status = base64.b64encode(STATUS.SerializeToString()).decode()
    stack.redis.set(keys.worker("w0"), json.dumps({"address": "localhost:1", "status": status}))


def test_after_an_outage_of_redis_workers_get_time_to_show_themselves(stack: Stack) -> None:
    clock = Clock()

    async def scan() -> None:
        client = redis.asyncio.Redis.from_url(stack.redis_url)
        router = Router(client, "m", clock)
        beat(stack)
        await router.scan()
        stack.redis.flushall()
        stack.kill_redis()
        clock.now_s += 60.0
        await router.scan()
        assert not router.current
        stack.start_redis()
        await router.scan()
        assert router.current
        assert router.find("w0") is not None
        clock.now_s += MISSING_GRACE_S / 2
        beat(stack)
        await router.scan()
        clock.now_s += MISSING_GRACE_S
        await router.scan()
        assert router.find("w0") is not None
        stack.redis.delete(keys.worker("w0"))
        clock.now_s += 2 * MISSING_GRACE_S
        await router.scan()
        assert router.find("w0") is None
        await client.aclose()

    asyncio.run(scan())
