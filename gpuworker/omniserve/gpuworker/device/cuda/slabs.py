"""Slots of the attention servers as the device sees them: its own memory, which the host shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omniserve.attnkernel import WorkerLink
from omniserve.gpuworker.device.cuda.gpu import Gpu


class Slab:
    """Of one server, in words of eight bytes: smaller elements would cross the bus one by one."""

    def __init__(self, slots: torch.Tensor, out_offset: int, kv_elements: int) -> None:
        """slots: [slots, elements], q, k and v first, outputs from `out_offset` on."""
        self.qkv = slots[:, :out_offset].view(torch.int64)
        self.out = slots[:, out_offset:].view(torch.int64)
        tokens = slots.shape[1] // kv_elements
        words = slots[:, : tokens * kv_elements].view(torch.int64)
        self.tokens = words.unflatten(1, (tokens, -1))
        """As CHECKPOINT and RESTORE use them, [slots, tokens, words of 2 kv_size]."""


class Slabs:
    """Of all servers, in the order of `Device.serve`."""

    def __init__(self, gpu: Gpu, dtype: torch.dtype, kv_elements: int) -> None:
        """kv_elements: of k and v of a token, in one layer."""
        self._gpu = gpu
        self._dtype = dtype
        self._kv_elements = kv_elements
        self._slabs: list[tuple[WorkerLink, Slab]] = []

    def __getitem__(self, place: int) -> Slab:
        return self._slabs[place][1]

    def of(self, link: WorkerLink) -> Slab | None:
        """None if that server has been replaced."""
        return next((slab for known, slab in self._slabs if known is link), None)

    def map(self, links: Sequence[WorkerLink]) -> None:
        """From now on those of `links`; nothing may be under way to or from others."""
        gone = [link for link, _ in self._slabs if not any(link is other for other in links)]
        self._slabs = [(link, self.of(link) or self._mapped(link)) for link in links]
        for link in gone:
            self._gpu.unmap_host(link.slab)

    def _mapped(self, link: WorkerLink) -> Slab:
        memory = self._gpu.map_host(link.slab, self._dtype)
        return Slab(memory, link.out_offset, self._kv_elements)
