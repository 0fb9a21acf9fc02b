"""Which rows are in the batch of a stage: index arrays on their way to the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from omniserve.gpuworker.device.cuda.gpu import Gpu
from omniserve.gpuworker.device.cuda.upload import Upload
from omniserve.gpuworker.device.port import DONE, Event

_ROWS, _POSITIONS, _TOKENS, _SLOTS = range(4)
_FIELDS = 4
_Int64s = npt.NDArray[np.int64]


class CudaPart(NamedTuple):
    """Rows of one owner in the batch of a stage; all arrays [rows]."""

    rows: _Int64s
    """Their places in the row store."""
    positions: _Int64s
    tokens: _Int64s
    slots: _Int64s | None = None
    """Of rows that attend at a server: their slots there, ..."""
    servers: npt.NDArray[np.int32] | None = None
    """... and which of the device's servers it is."""


class Boarded(NamedTuple):
    """Rows of the batch that have slots at one server."""

    server: int
    first: int
    end: int


class Batch:
    """Index arrays of one stage in flight, in pinned memory and on the device.

    Several of them take turns: the host fills one while the device reads others.
    """

    def __init__(self, gpu: Gpu, rows_max: int, scratch_row: int) -> None:
        self._upload = Upload(gpu, _FIELDS, rows_max)
        self.device = self._upload.device(0)
        """[fields, padded]: the index arrays, once they are uploaded."""
        self._scratch_row = scratch_row
        self.rows = 0
        """In the batch, ..."""
        self.padded = 0
        """... and with those that only fill a graph's bucket."""
        self.order = np.empty(0, np.int64)
        """Where in the parts, one after the other, the batch's rows stand."""
        self.boarded: list[Boarded] = []
        self.computed: Event = DONE
        """The end of its stage, ..."""
        self.sent: Event = DONE
        """... and when boarded rows' q, k and v are in their slots."""

    def is_free(self) -> bool:
        """Whether the device has done with it."""
        return self.computed.done() and self.sent.done()

    def fill(self, parts: Sequence[CudaPart], padded_to: Callable[[int], int]) -> None:
        """Takes the rows of `parts`: those of a server side by side, behind all others."""
        rows = np.concatenate([part.rows for part in parts])
        servers = np.concatenate(
            [np.full(len(p.rows), -1) if p.servers is None else p.servers for p in parts]
        )
        slots = np.concatenate(
            [np.zeros(len(p.rows), int) if p.slots is None else p.slots for p in parts]
        )
        self.rows = len(rows)
        self.padded = padded_to(self.rows)
        self.order = order = np.argsort(servers, kind="stable")
        self.device = self._upload.device(self.padded)
        arrays = self._upload.host(self.padded)
        arrays[:, self.rows :] = 0
        arrays[_ROWS, self.rows :] = self._scratch_row
        arrays[_ROWS, : self.rows] = rows[order]
        arrays[_POSITIONS, : self.rows] = np.concatenate([p.positions for p in parts])[order]
        arrays[_TOKENS, : self.rows] = np.concatenate([p.tokens for p in parts])[order]
        arrays[_SLOTS, : self.rows] = slots[order]
        names, firsts, counts = np.unique(servers[order], return_index=True, return_counts=True)
        self.boarded = [
            Boarded(int(server), int(first), int(first + count))
            for server, first, count in zip(names, firsts, counts, strict=True)
            if server >= 0
        ]

    def upload(self) -> None:
        """Enqueues the copy of what `fill` left."""
        self._upload.copy(self.padded)


class Index:
    """The index arrays that graphs read: always the same memory."""

    def __init__(self, gpu: Gpu, rows_max: int) -> None:
        self._arrays = gpu.zeros(_FIELDS, rows_max, dtype=torch.int64)

    def load(self, batch: Batch) -> None:
        """Enqueues the copy."""
        self._arrays[:, : batch.padded].copy_(batch.device)

    def rows(self, count: int) -> torch.Tensor:
        return self._arrays[_ROWS, :count]

    def positions(self, count: int) -> torch.Tensor:
        return self._arrays[_POSITIONS, :count]

    def tokens(self, count: int) -> torch.Tensor:
        return self._arrays[_TOKENS, :count]


def rows_of(batch: Batch, boarded: Boarded) -> torch.Tensor:
    """Places of boarded rows in the row store."""
    return batch.device[_ROWS, boarded.first : boarded.end]


def slots_of(batch: Batch, boarded: Boarded) -> torch.Tensor:
    """Their slots at their server."""
    return batch.device[_SLOTS, boarded.first : boarded.end]
