"""Which rows are in the batch of a stage: index arrays on their way to the device."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from omniserve.gpuworker.device.cuda.gpu import Gpu
from omniserve.gpuworker.device.cuda.upload import Upload
from omniserve.gpuworker.device.port import DONE, Event

_ROWS, _POSITIONS, _TOKENS, _PAGES, _OFFSETS, _SLOTS = range(6)
_FIELDS = 6
_Int64s = npt.NDArray[np.int64]
_Int32s = npt.NDArray[np.int32]


class CudaPart(NamedTuple):
    """Rows of one owner in the batch of a stage."""

    columns: _Int64s
    """[fields, rows]: an index array each."""
    servers: _Int32s | None = None
    """[rows], which of the device's servers they attend at; None if on the device."""

    @staticmethod
    def local(
        rows: _Int64s, positions: _Int64s, tokens: _Int64s, pages: _Int32s, offsets: _Int32s
    ) -> CudaPart:
        """Rows that attend on the device: their places in the row store, and of their k and v."""
        return CudaPart(np.stack([rows, positions, tokens, pages, offsets, np.zeros_like(rows)]))

    @staticmethod
    def boarding(
        rows: _Int64s,
        positions: _Int64s,
        tokens: _Int64s,
        slots: _Int32s,
        servers: _Int32s,
        scratch_page: int,
    ) -> CudaPart:
        """Rows that attend at servers; on the device their k and v go to a page of nobody's."""
        pages, offsets = np.full_like(rows, scratch_page), np.zeros_like(rows)
        return CudaPart(np.stack([rows, positions, tokens, pages, offsets, slots]), servers)

    def only(self, rows: _Int64s | slice) -> CudaPart:
        """Some of the rows."""
        servers = None if self.servers is None else self.servers[rows]
        return CudaPart(self.columns[:, rows], servers)


class Boarded(NamedTuple):
    """Rows of the batch that have slots at one server."""

    server: int
    first: int
    end: int


class Batch:
    """Index arrays of one stage in flight, in pinned memory and on the device.

    Several of them take turns: the host fills one while the device reads others.
    """

    def __init__(self, gpu: Gpu, rows_max: int, scratch_row: int, scratch_page: int) -> None:
        """scratch_row, scratch_page: what rows that only fill a bucket write to."""
        self._upload = Upload(gpu, _FIELDS, rows_max)
        self.device = self._upload.device(0)
        """[fields, padded]: the index arrays, once they are uploaded."""
        self._padding = np.zeros((_FIELDS, 1), np.int64)
        self._padding[[_ROWS, _PAGES], 0] = scratch_row, scratch_page
        self._parts: tuple[CudaPart, ...] = ()
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

    def has(self, parts: Sequence[CudaPart]) -> bool:
        """Whether it has these very parts. Those that board are new for every stage."""
        return len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts))

    def repeat(self, before: Batch) -> None:
        """Takes the rows of `before`, which none boards; needs no upload."""
        self._parts, self.boarded = before._parts, []
        self.rows, self.padded, self.order = before.rows, before.padded, before.order

    def fill(self, parts: Sequence[CudaPart], padded_to: Callable[[int], int]) -> None:
        """Takes the rows of `parts`, those of a server side by side.

        Only the last part may have rows with servers.
        """
        columns = np.concatenate([part.columns for part in parts], axis=1)
        self._parts, self.boarded = tuple(parts), []
        self.rows = columns.shape[1]
        self.padded = padded_to(self.rows)
        self.order = np.arange(self.rows)
        if (servers := parts[-1].servers) is not None:
            first = self.rows - len(servers)
            self.order[first:] = first + servers.argsort(kind="stable")
            for server, count in enumerate(np.bincount(servers).tolist()):
                if count:
                    self.boarded.append(Boarded(server, first, first + count))
                    first += count
        self.device = self._upload.device(self.padded)
        arrays = self._upload.host(self.padded)
        arrays[:, : self.rows] = columns[:, self.order]
        arrays[:, self.rows :] = self._padding

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

    def kv_places(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and offsets."""
        return self._arrays[_PAGES, :count], self._arrays[_OFFSETS, :count]


def rows_of(batch: Batch, boarded: Boarded) -> torch.Tensor:
    """Places of boarded rows in the row store."""
    return batch.device[_ROWS, boarded.first : boarded.end]


def slots_of(batch: Batch, boarded: Boarded) -> torch.Tensor:
    """Their slots at their server."""
    return batch.device[_SLOTS, boarded.first : boarded.end]
