"""TLS in front of a server that has none: the Valkey that tests start is built without."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from types import TracebackType

from support.certificates import Certificate


class TlsProxy:
    """Passes what comes to `port` on to `target_port`, both of 127.0.0.1."""

    def __init__(self, certificate: Certificate, target_port: int) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate.cert, certificate.key)
        self._target_port = target_port
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._listening = threading.Event()
        self.port = 0

    def __enter__(self) -> TlsProxy:
        self._thread.start()
        self._listening.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port = int(server.sockets[0].getsockname()[1])
        self._listening.set()
        await self._stop.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):  # a side, or the test, ends
            inner = await asyncio.open_connection("127.0.0.1", self._target_port)
            await asyncio.gather(_pump(reader, inner[1]), _pump(inner[0], writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
