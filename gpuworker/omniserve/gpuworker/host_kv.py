"""All attention servers of the worker together: who holds which sequence, and its transfers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from omniserve.attnkernel import WorkerLink
from omniserve.gpuworker.device.afterwards import Afterwards
from omniserve.gpuworker.device.port import KvTransfers
from omniserve.gpuworker.kv.mirror import Mirror
from omniserve.gpuworker.requests import Place, Request
from omniserve.gpuworker.servers import AttentionServer, Ints


class HostKv:
    """Routes by `request.server`. Owned by the engine's loop; nothing here blocks."""

    def __init__(
        self,
        device: KvTransfers,
        afterwards: Afterwards,
        layers: int,
        page_tokens: int,
        clock_ns: Callable[[], int],
    ) -> None:
        self.servers: list[AttentionServer] = []
        self._device = device
        self._afterwards = afterwards
        self._layers = layers
        self._page_tokens = page_tokens
        self._clock_ns = clock_ns
        self._mirrors: dict[int, Mirror] = {}
        self._lingering: list[Request] = []
        """What is left of requests that gave their sequence back while transfers were out: FREE
        follows when they are answered."""
        self._freeing: set[tuple[int, int]] = set()
        """(server, sequence) whose FREE is not answered yet."""
        self.refused: list[tuple[Request, int]] = []
        """Requests of which a server refused a transfer, with the status; for who ends them."""

    def attach(self, index: int, link: WorkerLink, pages: int) -> None:
        """Takes a server into use; one of the same index, whose arena is lost, goes."""
        server = AttentionServer(index, link, pages)
        self._lingering = [r for r in self._lingering if r.server != index]
        self._freeing = {pair for pair in self._freeing if pair[0] != index}
        self.servers[:] = [s for s in self.servers if s.index != index] + [server]
        if index in self._mirrors:
            self._mirrors[index].lose()
        self._mirrors[index] = Mirror(
            server, self._device, self._afterwards, self._layers, self._page_tokens
        )

    def server(self, index: int) -> AttentionServer | None:
        return next((s for s in self.servers if s.index == index), None)

    def can_reserve(self, request: Request) -> bool:
        """Whether a server that answers has a sequence and the pages of prompt + max_tokens."""
        return bool(self._roomy(request))

    def reserve(self, request: Request) -> None:
        """Reserves room for all of `request` at the server with most pages free."""
        max(self._roomy(request), key=lambda server: server.pages_free).reserve(request)

    def _roomy(self, request: Request) -> list[AttentionServer]:
        return [s for s in self.servers if not s.silent and s.has_room(request)]

    def is_silent(self, request: Request) -> bool:
        """Whether the server of `request` seems to have stopped."""
        server = self.server(request.server)
        return server is not None and server.silent

    def release(self, request: Request) -> None:
        """Gives the sequence back: the request may start anew at once.

        Its transfers that are out keep sequence and pages until the server has answered them,
        which a stopped one does not.
        """
        if request.server < 0:
            return
        if request.transfers == 0:
            self._free(request)
            return
        remains = replace(request, place=Place.ENDED, blocks=[])
        self._mirrors[request.server].hand_over(request, remains)
        self._lingering.append(remains)
        self.forget(request)

    def forget(self, request: Request) -> None:
        """It has no sequence any more: its server lost its arena, or it was given back."""
        request.server = request.sequence = -1
        request.transfers = request.mirrored_sent = request.mirrored = 0

    def mirrored(self, request: Request) -> int:
        """Tokens whose KV the arena has in every layer; 0 without a server."""
        server = self.server(request.server)
        return server.mirrored(request) if server is not None else 0

    def checkpoint(self, request: Request) -> int:
        return self._mirrors[request.server].checkpoint(request)

    def restore(self, request: Request) -> None:
        self._mirrors[request.server].restore(request)

    def start_transfers(self) -> None:
        """Called once an iteration, behind `checkpoint` and `restore`."""
        self._device.start()

    def poll(self, server: AttentionServer) -> tuple[Ints, npt.NDArray[np.uint8]]:
        """Takes a server's answers; returns (sequences, statuses) of attention rows."""
        slots, statuses = server.link.poll()
        server.heard(len(slots), self._clock_ns())
        if not len(slots):
            return slots, statuses
        transfers = slots >= server.sequences_max
        if transfers.any():
            mirror = self._mirrors[server.index]
            self.refused += mirror.answered(slots[transfers], statuses[transfers])
            self._settle()
            slots, statuses = slots[~transfers], statuses[~transfers]
        if not self._freeing:
            return slots, statuses
        freed = np.array([(server.index, s) in self._freeing for s in slots.tolist()], dtype=bool)
        for sequence in slots[freed].tolist():
            self._freeing.remove((server.index, sequence))
            server.freed(sequence)
        return slots[~freed], statuses[~freed]

    def busy(self) -> bool:
        return bool(self._lingering or self._freeing)

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises RuntimeError if a sequence or slot leaked."""
        holders = [*requests, *self._lingering]
        for server in self.servers:
            freeing = sum(index == server.index for index, _ in self._freeing)
            server.check_integrity(holders, freeing)

    def _settle(self) -> None:
        for request in [r for r in self._lingering if r.transfers == 0]:
            self._lingering.remove(request)
            self._free(request)

    def _free(self, request: Request) -> None:
        server = self.server(request.server)
        assert server is not None, "a request of a server that was never attached"
        self._freeing.add((request.server, request.sequence))
        server.free(request)
        request.server = request.sequence = -1
