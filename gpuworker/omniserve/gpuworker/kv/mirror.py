"""Moves KV between device and arenas: incremental checkpoints out, restores in (ConServe).

A CHECKPOINT follows the tokens that a BE request computes on the device, so that giving up its
device pages costs nothing; a RESTORE brings them back for promotion. Both go token by token and
layer by layer through a server's transfer slots, as many as are free, and never wait.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from omniserve.attnkernel import KIND_CHECKPOINT, KIND_RESTORE, STATUS_OK, PagedKv
from omniserve.gpuworker.requests import Request
from omniserve.gpuworker.servers import AttentionServer

Ints = npt.NDArray[np.int32]


class Mirror:
    """Transfers of one server. Owned by the engine's loop."""

    def __init__(self, server: AttentionServer, kv: PagedKv, layers: int, page_tokens: int) -> None:
        self._server = server
        self._kv = kv
        self._layers = layers
        self._page_tokens = page_tokens
        slots = int(server.link.geometry.slots)
        self._owner: list[Request | None] = [None] * slots
        self._kind = np.zeros(slots, dtype=np.int8)
        self._layer = np.zeros(slots, dtype=np.int32)
        self._position = np.zeros(slots, dtype=np.int32)

    def checkpoint(self, request: Request) -> int:
        """Sends KV that is computed but not sent yet, as far as slots go; returns the tokens."""
        start = request.mirrored_sent
        tokens = self._affordable(request.computed - start)
        if tokens:
            slots, layers, positions = self._rows(start, tokens)
            pages, offsets = self._place(request, positions)
            self._kv.export_rows(self._server.link, layers, pages, offsets, slots)
            self._send(KIND_CHECKPOINT, request, layers, positions, slots)
        return tokens

    def restore(self, request: Request) -> None:
        """Asks for KV that the device lacks, as far as slots go."""
        start = request.restored
        tokens = self._affordable(request.computed - start)
        if tokens:
            slots, layers, positions = self._rows(start, tokens)
            self._send(KIND_RESTORE, request, layers, positions, slots)
            request.restored += tokens

    def answered(self, slots: Ints, statuses: npt.NDArray[np.uint8]) -> list[tuple[Request, int]]:
        """Takes completed transfers: restored rows go into the request's device pages.

        Returns the requests of which a transfer was refused, with the status.
        """
        refused = [
            (owner, int(status))
            for slot, status in zip(slots.tolist(), statuses.tolist(), strict=True)
            if status != STATUS_OK and (owner := self._owner[slot]) is not None
        ]
        restored = slots[self._kind[slots] == KIND_RESTORE]
        for request in {id(r): r for r in (self._owner[s] for s in restored) if r}.values():
            rows = restored[[self._owner[s] is request for s in restored]]
            if request.blocks:  # none if it ended on the way
                pages, offsets = self._place(request, self._position[rows])
                layers = self._layer[rows]
                self._kv.import_rows(self._server.link, layers, pages, offsets, rows)
        for slot in slots.tolist():
            owner = self._owner[slot]
            assert owner is not None, "an answer for a slot that nobody owns"
            owner.transfers -= 1
            self._owner[slot] = None
        self._server.transfer_slots_free.extend(slots.tolist())
        return refused

    def _affordable(self, tokens: int) -> int:
        return min(tokens, len(self._server.transfer_slots_free) // self._layers)

    def _rows(self, start: int, tokens: int) -> tuple[Ints, Ints, Ints]:
        """Takes a slot for each token and layer; positions grow within each layer."""
        count = tokens * self._layers
        free = self._server.transfer_slots_free
        slots = np.array(free[len(free) - count :], dtype=np.int32)
        del free[len(free) - count :]
        layers = np.repeat(np.arange(self._layers, dtype=np.int32), tokens)
        positions = np.tile(np.arange(start, start + tokens, dtype=np.int32), self._layers)
        return slots, layers, positions

    def _place(self, request: Request, positions: Ints) -> tuple[Ints, Ints]:
        blocks = np.asarray(request.blocks, dtype=np.int32)
        return blocks[positions // self._page_tokens], positions % self._page_tokens

    def _send(
        self, kind: int, request: Request, layers: Ints, positions: Ints, slots: Ints
    ) -> None:
        sequences = np.full(len(slots), request.sequence, dtype=np.int32)
        self._server.link.submit(kind, layers, sequences, positions, slots)
        self._kind[slots], self._layer[slots], self._position[slots] = kind, layers, positions
        for slot in slots.tolist():
            self._owner[slot] = request
        request.transfers += len(slots)
