"""CHECKPOINT and RESTORE on the device: KV between its pages and servers' slots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from omniserve.gpuworker.device.cuda.gpu import Event, Gpu, Stream
from omniserve.gpuworker.device.cuda.kv import DevicePages

_Int64s = npt.NDArray[np.int64]
_Copy = Callable[[torch.Tensor, torch.Tensor], None]


class Upload:
    """Index arrays of one kind: the same memory each time, so one is used before the next."""

    def __init__(self, gpu: Gpu, fields: int, columns_max: int) -> None:
        self._host = gpu.pinned(fields, columns_max, dtype=torch.int64)
        self._arrays = self._host.numpy()
        self._device = gpu.zeros(fields, columns_max, dtype=torch.int64)

    def enqueue(self, stream: Stream, array: _Int64s) -> torch.Tensor:
        """array: [fields, columns]. Whoever calls knows that the last one was used."""
        columns = array.shape[1]
        self._arrays[:, :columns] = array
        device = self._device[:, :columns]
        host = self._host[:, :columns]
        stream.launch(lambda: device.copy_(host, non_blocking=True))
        return device


class Transfers:
    """One copy at a time, on a stream that gives way to all others."""

    def __init__(self, gpu: Gpu, pages: DevicePages, tokens_max: int) -> None:
        """tokens_max: of one copy, counting each layer's."""
        self._pages = pages
        self._stream = gpu.stream()
        self._upload = Upload(gpu, 5, tokens_max)
        self._last: Event | None = None

    def is_free(self) -> bool:
        """Whether the last copy is done: before, there is no next one."""
        return self._last is None or self._last.done()

    def export(self, after: Event, places: _Int64s, slab: torch.Tensor) -> Event:
        """Copies KV that is there `after` into slots; returns when it is in them.

        places: [5, tokens]: layer, page, offset, slot, and which of the slot's tokens each is.
        slab: [slots, tokens of a slot, 2 kv_size].
        """
        return self._copy(after, places, slab, self._pages.export)

    def take_in(self, after: Event, places: _Int64s, slab: torch.Tensor) -> Event:
        """Copies KV out of slots into pages that nobody uses any more `after`.

        Nothing may attend to it, and the slots are not free, before the event that it returns.
        """
        return self._copy(after, places, slab, self._pages.take_in)

    def _copy(self, after: Event, places: _Int64s, slab: torch.Tensor, copy: _Copy) -> Event:
        assert self.is_free(), "a second copy at a time"
        self._stream.wait(after)
        on_device = self._upload.enqueue(self._stream, places)
        self._stream.launch(partial(copy, on_device, slab))
        self._last = self._stream.record()
        return self._last
