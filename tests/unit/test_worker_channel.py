"""The socket between a worker's front and engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from omniserve.attnkernel import Bell
from omniserve.errors import NoWorkerError
from omniserve.gpuworker.channel import EngineChannel, FrontChannel
from omniserve.internal.v1 import engine_pb2, worker_pb2

# Far more than a local socket holds.
MANY = 5000
LONG_PROMPT = list(range(300_000))


class Pair:
    """Both ends in this process, and what the front has been told."""

    def __init__(self, folder: Path) -> None:
        front_end, engine_end = socket.socketpair()
        bell = Bell(str(folder / "bell"), create=True)
        self.engine_end = engine_end
        self.front = FrontChannel(front_end, bell)
        self.engine = EngineChannel(engine_end, bell)
        self.events: list[engine_pb2.EngineEvent] = []

    async def open(self) -> None:
        await self.front.open(self.events.append)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not holds():
                await asyncio.sleep(0.001)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def _token(number: int) -> engine_pb2.EngineEvent:
    sampled = engine_pb2.SampledTokens(request_ids=["r" * 100], token_ids=[number])
    return engine_pb2.EngineEvent(sampled=sampled)


def test_events_arrive_whole_and_in_order_however_many_wait(pair: Pair) -> None:
    async def run() -> None:
        await pair.open()
        for number in range(MANY):  # the front takes none meanwhile, and the engine never waits
            pair.engine.send(_token(number))
        while len(pair.events) < MANY:
            await asyncio.sleep(0.001)
            if len(pair.events) < MANY:
                pair.engine.send(engine_pb2.EngineEvent())  # sends what the socket did not take
        pair.front.close()

    asyncio.run(run())
    tokens = [event.sampled.token_ids[0] for event in pair.events if event.sampled.token_ids]
    assert tokens == list(range(MANY))


def test_a_command_larger_than_the_socket_arrives_whole(pair: Pair) -> None:
    submit = worker_pb2.WorkerServiceGenerateRequest(request_id="a", prompt_token_ids=LONG_PROMPT)
    got: list[engine_pb2.EngineCommand] = []

    async def run() -> None:
        await pair.open()
        pair.front.send(engine_pb2.EngineCommand(submit=submit))
        pair.front.send(engine_pb2.EngineCommand(cancel="a"))

        def both() -> bool:
            got.extend(pair.engine.receive())
            return len(got) == 2

        await pair.until(both)
        pair.front.close()

    asyncio.run(run())
    assert list(got[0].submit.prompt_token_ids) == LONG_PROMPT
    assert got[1].cancel == "a"


def test_between_passes_only_a_rung_bell_makes_the_engine_look(pair: Pair) -> None:
    async def run() -> None:
        await pair.open()
        assert pair.engine.receive() == []
        assert pair.engine.receive_if_rung() == []
        pair.front.send(engine_pb2.EngineCommand(cancel="a"))
        assert [command.cancel for command in pair.engine.receive_if_rung()] == ["a"]
        assert pair.engine.receive_if_rung() == []
        pair.front.close()

    asyncio.run(run())


def test_sending_to_an_engine_that_is_gone_says_so(pair: Pair) -> None:
    async def run() -> None:
        await pair.open()
        pair.engine_end.close()

        def refused() -> bool:
            try:
                pair.front.send(engine_pb2.EngineCommand(cancel="a"))
            except NoWorkerError:
                return True
            return False

        await pair.until(refused)

    asyncio.run(run())


def test_what_the_engine_said_last_reaches_the_front_before_the_end(pair: Pair) -> None:
    async def run() -> None:
        await pair.open()
        failed = engine_pb2.EngineFailed(reason="MODEL_FILE", message="why")
        pair.engine.send(engine_pb2.EngineEvent(failed=failed))
        pair.engine.close()
        await pair.until(lambda: bool(pair.events))
        pair.front.close()

    asyncio.run(run())
    assert pair.events[0].failed.message == "why"
