"""The link between a worker's two processes: protobuf messages over a local ZeroMQ pair.

Neither side ever blocks on the other. The front rings the engine's bell after a command, so that
an idle engine waits at one place for commands and for attention servers.
"""

from __future__ import annotations

import zmq
import zmq.asyncio

from omniserve.attnkernel import Bell
from omniserve.errors import NoWorkerError
from omniserve.internal.v1 import engine_pb2


class EngineChannel:
    """The engine's end."""

    def __init__(self, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.connect(endpoint)

    def receive(self) -> list[engine_pb2.EngineCommand]:
        """Returns the commands that have arrived; never blocks."""
        commands: list[engine_pb2.EngineCommand] = []
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return commands
            commands.append(engine_pb2.EngineCommand.FromString(data))

    def send(self, event: engine_pb2.EngineEvent) -> None:
        self._socket.send(event.SerializeToString(), zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close(linger=1000)
        # The process ends without cleaning up: wait until what was sent has left it.
        zmq.Context.instance().term()


class FrontChannel:
    """The front's end, for an asyncio loop."""

    def __init__(self, endpoint: str, bell: Bell) -> None:
        self._bell = bell
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(endpoint)

    async def send(self, command: engine_pb2.EngineCommand) -> None:
        """Raises NoWorkerError if there is no engine at the other end: it could be waited for
        for ever."""
        try:
            await self._socket.send(command.SerializeToString(), zmq.NOBLOCK)
        except zmq.Again as error:
            raise NoWorkerError("the engine is not running", retry_after_s=1.0) from error
        self._bell.ring()

    async def receive(self) -> engine_pb2.EngineEvent:
        return engine_pb2.EngineEvent.FromString(await self._socket.recv())

    def close(self) -> None:
        self._socket.close(linger=0)
