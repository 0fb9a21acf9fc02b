"""The attention servers as the engine sees them: links, page leases, sequences and slots.

Of a link's slots, number `s` below `max_sequences` belongs to sequence `s` for ATTEND and FREE:
holding a sequence *is* the credit for its next send. The others carry CHECKPOINT and RESTORE.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from omniserve.attnkernel import KIND_ATTEND, KIND_FREE, WorkerLink
from omniserve.gpuworker.requests import Request

Ints = npt.NDArray[np.int32]
# A server that owes answers and has given none for so long is taken for gone until it gives one.
# In the background of busy cores it may take a second for one.
_SILENT_NS = 5_000_000_000
_NEVER = 1 << 62


class AttentionServer:
    """One attached server. Owned by the engine's loop; nothing here blocks."""

    def __init__(self, index: int, link: WorkerLink, pages: int) -> None:
        geometry = link.geometry
        self.index = index
        self.link = link
        self.pages_free = pages
        self.page_tokens = int(geometry.page_tokens)
        self.sequences_max = int(geometry.max_sequences)
        self.sequences_free = list(range(self.sequences_max - 1, -1, -1))
        self.transfer_slots_free = list(range(int(geometry.slots) - 1, self.sequences_max - 1, -1))
        self.silent = False
        """Whether it seems to have stopped."""
        self._owing_since_ns = _NEVER

    def heard(self, answers: int, now_ns: int) -> None:
        """Called with the number of messages that it has answered since the last time."""
        if not self.link.outstanding:
            self._owing_since_ns = _NEVER
        elif answers or self._owing_since_ns == _NEVER:
            self._owing_since_ns = now_ns
        self.silent = now_ns - self._owing_since_ns > _SILENT_NS

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def has_room(self, request: Request) -> bool:
        """Whether a sequence and the pages of prompt + max_tokens can be reserved."""
        return bool(self.sequences_free) and self.pages_for(request.limit) <= self.pages_free

    def reserve(self, request: Request) -> None:
        """Reserves a sequence and the pages of prompt + max_tokens; the caller saw the room."""
        self.pages_free -= self.pages_for(request.limit)
        request.server, request.sequence = self.index, self.sequences_free.pop()
        request.mirrored_sent = request.mirrored = request.restored = 0

    def free(self, request: Request) -> None:
        """Sends FREE; the sequence can be used again when it is answered."""
        self.pages_free += self.pages_for(request.limit)
        self._submit(KIND_FREE, 0, np.array([request.sequence], dtype=np.int32), np.zeros(1, int))

    def freed(self, sequence: int) -> None:
        self.sequences_free.append(sequence)

    def attend(self, layer: int, sequences: Ints, positions: npt.NDArray[np.int64]) -> None:
        """Sends rows whose q, k and v are in their slots. One message a call."""
        self._submit(KIND_ATTEND, layer, sequences, positions)

    def mirrored(self, request: Request) -> int:
        """Tokens of `request` whose KV is in the arena in every layer, as far as is known."""
        if not self.link.current:
            return request.mirrored
        return int(self.link.written_len[request.sequence].min())

    def check_integrity(self, requests: list[Request], freeing: int) -> None:
        """Raises RuntimeError unless every sequence and slot is accounted for."""
        mine = [r for r in requests if r.server == self.index]
        transfers = sum(r.transfers for r in mine)
        slots = int(self.link.geometry.slots) - self.sequences_max
        if len(mine) + len(self.sequences_free) + freeing != self.sequences_max:
            raise RuntimeError(f"server {self.index}: sequences leaked or shared")
        if transfers + len(self.transfer_slots_free) != slots:
            raise RuntimeError(f"server {self.index}: transfer slots leaked or shared")
        self.link.check_integrity()

    def _submit(
        self, kind: int, layer: int, sequences: Ints, positions: npt.NDArray[np.integer]
    ) -> None:
        layers = np.full(len(sequences), layer, dtype=np.int32)
        self.link.submit(kind, layers, sequences, positions.astype(np.int32), sequences)
