"""Keeps the worker attached to its attention servers, and their figures at hand."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import grpc

from omniserve.channel import RECONNECT_OPTIONS
from omniserve.internal.v1 import attention_pb2, attention_pb2_grpc, engine_pb2
from omniserve.v1 import status_pb2

_log = logging.getLogger(__name__)
_POLL_S = 0.25
_RPC_TIMEOUT_S = 2.0
_ATTACH_TIMEOUT_S = 30.0


class Attachments:
    """One task per server: attach, watch, and attach again once the server is back.

    A server that merely crashed comes back with the same segment and goes on by itself; only a
    new segment id tells the engine that KV was lost.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        request: attention_pb2.AttachRequest,
        send: Callable[[engine_pb2.EngineCommand], None],
    ) -> None:
        self._addresses = addresses
        self._request = request
        self._send = send
        self._attached: set[int] = set()
        self._stats: dict[int, status_pb2.AttentionServerStatus] = {}

    @property
    def complete(self) -> bool:
        """Whether every server has been attached since the start."""
        return len(self._attached) == len(self._addresses)

    @property
    def stats(self) -> list[status_pb2.AttentionServerStatus]:
        """The last figures of each server, in the order of the addresses."""
        return [self._stats[index] for index in sorted(self._stats)]

    async def run(self) -> None:
        """Runs until cancelled."""
        watches = (self._watch(index, address) for index, address in enumerate(self._addresses))
        await asyncio.gather(*watches)

    async def _watch(self, index: int, address: str) -> None:
        async with grpc.aio.insecure_channel(address, options=RECONNECT_OPTIONS) as channel:
            stub = attention_pb2_grpc.AttentionServiceStub(channel)
            while True:
                try:
                    await self._attach(index, stub)
                    attached = True
                    while attached:
                        request = attention_pb2.GetStatsRequest()
                        answer = await stub.GetStats(request, timeout=_RPC_TIMEOUT_S)
                        self._stats[index] = answer.stats
                        # No call fails if it went and came back, empty, between two of them.
                        attached = answer.stats.pages_total > 0
                        await asyncio.sleep(_POLL_S)
                except grpc.aio.AioRpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE:
                        _log.warning("attention server %s: %s", address, error.details())
                    await asyncio.sleep(_POLL_S)

    async def _attach(self, index: int, stub: attention_pb2_grpc.AttentionServiceStub) -> None:
        segment = await stub.Attach(self._request, timeout=_ATTACH_TIMEOUT_S, wait_for_ready=True)
        attach = engine_pb2.AttachServer(index=index, segment=segment)
        self._send(engine_pb2.EngineCommand(attach=attach))
        self._attached.add(index)
        _log.info("attached %s: segment %x", segment.server_id, segment.segment_id)
