"""The link between a worker's two processes: protobuf messages over a local stream socket.

Neither side ever blocks on the other: what the socket does not take at once waits at the sender.
The front rings the engine's bell after a command, so that an idle engine waits at one place for
commands and for attention servers, and a busy one sees without a system call that there are none.
A message is its length (4 bytes, little-endian) and its bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterator

from omniserve.attnkernel import Bell
from omniserve.errors import NoWorkerError
from omniserve.internal.v1 import engine_pb2

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18
_CLOSE_S = 1.0


class EngineChannel:
    """The engine's end."""

    def __init__(self, end: socket.socket, bell: Bell) -> None:
        end.setblocking(False)
        self._socket = end
        self._bell = bell
        self._rung = -1
        self._received = _Frames()
        self._unsent = bytearray()

    def receive(self) -> list[engine_pb2.EngineCommand]:
        """Returns the commands that have arrived; never blocks."""
        self._rung = self._bell.value()
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                break
            self._received.add(data)
            if len(data) < _READ_BYTES:
                break
        return [engine_pb2.EngineCommand.FromString(frame) for frame in self._received.take()]

    def receive_if_rung(self) -> list[engine_pb2.EngineCommand]:
        """As `receive`, which costs a system call, if the bell has rung since the last one."""
        return self.receive() if self._bell.value() != self._rung else []

    def send(self, event: engine_pb2.EngineEvent) -> None:
        self._unsent += _framed(event.SerializeToString())
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:  # the front is gone, and the kernel ends this process with it
            sent = len(self._unsent)
        del self._unsent[:sent]

    def close(self) -> None:
        """Waits a little until the front has taken what was sent."""
        self._socket.settimeout(_CLOSE_S)
        with contextlib.suppress(OSError):
            self._socket.sendall(self._unsent)
        self._socket.close()


class FrontChannel(asyncio.Protocol):
    """The front's end, for an asyncio loop. `open` it before anything else."""

    def __init__(self, end: socket.socket, bell: Bell) -> None:
        self._socket = end
        self._bell = bell
        self._received = _Frames()
        self._apply: Callable[[engine_pb2.EngineEvent], None]
        self._transport: asyncio.Transport | None = None

    async def open(self, apply: Callable[[engine_pb2.EngineEvent], None]) -> None:
        """From now on calls `apply` with every event of the engine, from the loop."""
        self._apply = apply
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_unix_connection(lambda: self, sock=self._socket)

    def send(self, command: engine_pb2.EngineCommand) -> None:
        """Raises NoWorkerError if the engine is gone; else it is told, if not at once."""
        if self._transport is None or self._transport.is_closing():
            raise NoWorkerError("the engine is not running", retry_after_s=1.0)
        self._transport.write(_framed(command.SerializeToString()))
        self._bell.ring()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._received.add(data)
        for frame in self._received.take():
            self._apply(engine_pb2.EngineEvent.FromString(frame))


class _Frames:
    """Messages out of a stream of bytes."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, data: bytes) -> None:
        self._bytes += data

    def take(self) -> Iterator[bytes]:
        """Yields the messages that are complete, in order."""
        start = 0
        while len(self._bytes) - start >= _LENGTH.size:
            begin = start + _LENGTH.size
            end = begin + _LENGTH.unpack_from(self._bytes, start)[0]
            if end > len(self._bytes):
                break
            yield bytes(self._bytes[begin:end])
            start = end
        del self._bytes[:start]


def _framed(message: bytes) -> bytes:
    return _LENGTH.pack(len(message)) + message
