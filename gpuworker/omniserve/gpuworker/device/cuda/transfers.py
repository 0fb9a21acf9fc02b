"""CHECKPOINT and RESTORE on the device: KV between its pages and servers' slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from omniserve.attnkernel import WorkerLink
from omniserve.gpuworker.device.cuda.gpu import Gpu, Stream
from omniserve.gpuworker.device.cuda.kv import DevicePages
from omniserve.gpuworker.device.cuda.slabs import Slab, Slabs
from omniserve.gpuworker.device.cuda.upload import Upload
from omniserve.gpuworker.device.port import DONE, Event, KvPlaces

_Copy = Callable[[torch.Tensor, torch.Tensor], None]


class CudaTransfers:
    """See KvTransfers. One copy at a time, on a stream that gives way to all others.

    What is asked for while it runs is gathered, and begins together.
    """

    def __init__(
        self, gpu: Gpu, model: Stream, pages: DevicePages, slabs: Slabs, tokens_max: int
    ) -> None:
        """tokens_max: all that slots have room for, counting each layer's."""
        self._model = model
        self._pages = pages
        self._slabs = slabs
        self._stream = gpu.stream()
        self._upload = Upload(gpu, len(KvPlaces._fields), tokens_max)
        self._gathered: list[tuple[WorkerLink, KvPlaces, _Copy]] = []
        self._next = _Copied()
        self._last: Event = DONE

    def export_tokens(self, link: WorkerLink, places: KvPlaces) -> Event:
        return self._ask(link, places, self._pages.export)

    def import_tokens(self, link: WorkerLink, places: KvPlaces) -> Event:
        return self._ask(link, places, self._pages.take_in)

    def start(self) -> None:
        if not self._gathered or not self._last.done():
            return
        asked = [
            (slab, places, copy)
            for link, places, copy in self._gathered
            if (slab := self._slabs.of(link)) is not None  # else the server is gone
        ]
        if asked:
            self._copy(asked)
        self._next.event = self._last = self._stream.record()
        self._next, self._gathered = _Copied(), []

    def wait(self) -> None:
        """Until nothing is under way: then pages and slots may be somebody else's."""
        while not self._last.done():
            pass

    def _ask(self, link: WorkerLink, places: KvPlaces, copy: _Copy) -> Event:
        self._gathered.append((link, places, copy))
        return self._next

    def _copy(self, asked: Sequence[tuple[Slab, KvPlaces, _Copy]]) -> None:
        # Behind the stages that compute what is exported, and that still read pages which imports
        # go into.
        self._stream.wait(self._model.record())
        counts = [len(places.layers) for _, places, _ in asked]
        together = np.concatenate([np.stack(places) for _, places, _ in asked], axis=1)
        pieces = self._upload.enqueue(self._stream, together).split(counts, dim=1)
        for (slab, _, copy), piece in zip(asked, pieces, strict=True):
            self._stream.launch(partial(copy, piece, slab.tokens))


class _Copied:
    """Done when the copy is that it is a part of; not before there is one."""

    def __init__(self) -> None:
        self.event: Event | None = None

    def done(self) -> bool:
        return self.event is not None and self.event.done()
