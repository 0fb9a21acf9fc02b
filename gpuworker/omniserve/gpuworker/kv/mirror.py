"""Moves KV between device and arenas: incremental checkpoints out, restores in (ConServe).

A CHECKPOINT follows the tokens that a BE request computes on the device, so that giving up its
device pages costs nothing; a RESTORE brings them back for promotion. Both go layer by layer through
a server's transfer slots, several tokens a slot, as many as are free, and never wait.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from omniserve.attnkernel import KIND_CHECKPOINT, KIND_RESTORE, STATUS_OK
from omniserve.gpuworker.device.afterwards import Afterwards
from omniserve.gpuworker.device.port import KvPlaces, KvTransfers
from omniserve.gpuworker.requests import Request
from omniserve.gpuworker.servers import AttentionServer

Ints = npt.NDArray[np.int32]


class Mirror:
    """Transfers of one server. Owned by the engine's loop."""

    def __init__(
        self,
        server: AttentionServer,
        device: KvTransfers,
        afterwards: Afterwards,
        layers: int,
        page_tokens: int,
    ) -> None:
        self._server = server
        self._device = device
        self._afterwards = afterwards
        self._layers = layers
        self._page_tokens = page_tokens
        self._lost = False
        slots = int(server.link.geometry.slots)
        self._slot_tokens = server.link.transfer_tokens
        self._owner: list[Request | None] = [None] * slots
        self._kind = np.zeros(slots, dtype=np.int8)
        self._layer = np.zeros(slots, dtype=np.int32)
        self._position = np.zeros(slots, dtype=np.int32)
        self._count = np.zeros(slots, dtype=np.int32)

    def checkpoint(self, request: Request) -> int:
        """Sends KV that is computed but not sent yet, as far as slots go; returns the tokens."""
        slots, tokens = self._take_slots(request.mirrored_sent, request.computed)
        if tokens:
            self._own(KIND_CHECKPOINT, request, slots)
            places = self._places(request, slots)
            exported = self._device.export_tokens(self._server.link, places)
            send = partial(self._send, KIND_CHECKPOINT, request.sequence, slots)
            self._afterwards.call(exported, send)
        return tokens

    def restore(self, request: Request) -> None:
        """Asks for KV that the device lacks, as far as slots go."""
        slots, tokens = self._take_slots(request.restored, request.computed)
        if tokens:
            self._own(KIND_RESTORE, request, slots)
            self._send(KIND_RESTORE, request.sequence, slots)
            request.restored += tokens

    def answered(self, slots: Ints, statuses: npt.NDArray[np.uint8]) -> list[tuple[Request, int]]:
        """Takes completed transfers: restored KV goes into the request's device pages.

        Returns the requests of which a transfer was refused, with the status.
        """
        refused = [
            (owner, int(status))
            for slot, status in zip(slots.tolist(), statuses.tolist(), strict=True)
            if status != STATUS_OK and (owner := self._owner[slot]) is not None
        ]
        is_restored = self._kind[slots] == KIND_RESTORE
        restored = slots[is_restored]
        for request in {id(r): r for r in (self._owner[s] for s in restored) if r}.values():
            mine = restored[[self._owner[s] is request for s in restored]]
            if request.blocks:
                self._import(request, mine)
            else:  # it ended on the way
                self._give_back(mine)
        self._give_back(slots[~is_restored])
        return refused

    def _import(self, request: Request, slots: Ints) -> None:
        request.imports += 1
        places = self._places(request, slots)
        imported = self._device.import_tokens(self._server.link, places)
        self._afterwards.call(imported, partial(self._imported, request, slots))

    def _imported(self, request: Request, slots: Ints) -> None:
        request.imports -= 1
        if not self._lost:
            self._give_back(slots)

    def _give_back(self, slots: Ints) -> None:
        for slot in slots.tolist():
            owner = self._owner[slot]
            assert owner is not None, "an answer for a slot that nobody owns"
            owner.transfers -= 1
            self._owner[slot] = None
        self._server.transfer_slots_free.extend(slots.tolist())

    def hand_over(self, request: Request, heir: Request) -> None:
        """Transfers of `request` that are out are answered to `heir` from now on."""
        for slot, owner in enumerate(self._owner):
            if owner is request:
                self._owner[slot] = heir

    def lose(self) -> None:
        """The server is gone with its arena; what is under way is nobody's any more."""
        self._lost = True

    def _take_slots(self, start: int, end: int) -> tuple[Ints, int]:
        """Takes slots for tokens `start` to `end` in every layer, as far as they go.

        Returns the slots, positions growing within each layer, and how many tokens they take.
        """
        free = self._server.transfer_slots_free
        per_layer = min(-(-(end - start) // self._slot_tokens), len(free) // self._layers)
        tokens = min(end - start, per_layer * self._slot_tokens)
        count = per_layer * self._layers
        slots = np.array(free[len(free) - count :], dtype=np.int32)
        del free[len(free) - count :]
        positions = np.arange(start, start + tokens, self._slot_tokens, dtype=np.int32)
        self._layer[slots] = np.repeat(np.arange(self._layers, dtype=np.int32), per_layer)
        self._position[slots] = np.tile(positions, self._layers)
        self._count[slots] = np.minimum(self._slot_tokens, start + tokens - self._position[slots])
        return slots, tokens

    def _places(self, request: Request, slots: Ints) -> KvPlaces:
        """Of every token in `slots`."""
        counts = self._count[slots]
        index = np.arange(int(counts.sum()), dtype=np.int32)
        index -= np.repeat(np.cumsum(counts) - counts, counts).astype(np.int32)
        positions = np.repeat(self._position[slots], counts) + index
        pages = np.asarray(request.blocks, dtype=np.int32)[positions // self._page_tokens]
        layers = np.repeat(self._layer[slots], counts)
        offsets = positions % self._page_tokens
        return KvPlaces(layers, pages, offsets, np.repeat(slots, counts), index)

    def _own(self, kind: int, request: Request, slots: Ints) -> None:
        self._kind[slots] = kind
        for slot in slots.tolist():
            self._owner[slot] = request
        request.transfers += len(slots)

    def _send(self, kind: int, sequence: int, slots: Ints) -> None:
        sequences = np.full(len(slots), sequence, dtype=np.int32)
        layers, positions, counts = self._layer[slots], self._position[slots], self._count[slots]
        self._server.link.submit(kind, layers, sequences, positions, slots, counts)
