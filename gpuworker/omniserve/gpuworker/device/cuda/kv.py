"""KV of the device in pages, and its ways to the slots of attention servers and back."""

from __future__ import annotations

import torch

from omniserve.gpuworker.device.cuda.gpu import Gpu
from omniserve.gpuworker.model.config import ModelConfig


class DevicePages:
    """K and V of each place (page, offset) side by side. All methods enqueue, none waits."""

    def __init__(
        self, gpu: Gpu, config: ModelConfig, pages: int, page_tokens: int, dtype: torch.dtype
    ) -> None:
        heads = (config.kv_heads, config.head_dim)
        self.layers = gpu.zeros(config.layers, pages + 1, 2, page_tokens, *heads, dtype=dtype)
        """[layers, pages, K and V, page_tokens, kv_heads, head_dim]: FlashInfer's NHD."""
        self.scratch_page = pages
        """One more than there are, for KV that nobody reads."""
        self._words = self.layers.transpose(2, 3).view(torch.int64)
        """The same memory, [layers, pages, page_tokens, K and V, kv_heads, words of a head].

        torch copies indexed elements one by one: words of eight bytes are fewer.
        """

    def append(
        self, layer: int, kv: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor
    ) -> None:
        """kv: [rows, 2 kv_size]; pages, offsets: [rows] int64."""
        rows = kv.view(torch.int64).view(len(kv), *self._words.shape[3:])
        self._words[layer].index_put_((pages, offsets), rows)

    def export(self, places: torch.Tensor, slab: torch.Tensor) -> None:
        """Copies KV into slots of a server.

        places: [5, n] int64: layer, page, offset, slot, and which of the slot's tokens each is.
        slab: [slots, tokens of a slot, words of 2 kv_size].
        """
        layers, pages, offsets, slots, indices = places
        words = self._words[layers, pages, offsets].flatten(1)
        slab.index_put_((slots, indices), words)

    def take_in(self, places: torch.Tensor, slab: torch.Tensor) -> None:
        """Copies KV from slots of a server; arguments as those of `export`."""
        layers, pages, offsets, slots, indices = places
        rows = slab[slots, indices].view(-1, *self._words.shape[3:])
        self._words.index_put_((layers, pages, offsets), rows)
