"""Random weights for a model of which only the shape is known."""

from __future__ import annotations

import zlib

import torch

from omniserve.gpuworker.model.config import ModelConfig

_BLOCK = (1 << 22) - 3
"""Values drawn; tensors repeat them, since billions of draws take minutes. Odd, so that rows of a
matrix differ."""


class DummyModel:
    """A WeightSource in bfloat16.

    Matrices keep the size of what they multiply; norms scale by about one, so that activations stay
    finite. The same shape has the same weights every time.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(0)
        self._block = torch.randn(_BLOCK, generator=generator).bfloat16()

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Returns tensor `name` (see WeightSource)."""
        values = torch.empty(shape, dtype=torch.bfloat16)
        flat = values.view(-1)
        block = self._block.roll(zlib.crc32(name.encode()) % _BLOCK)  # tensors differ, too
        for start in range(0, flat.numel(), _BLOCK):
            part = flat[start : start + _BLOCK]
            part.copy_(block[: part.numel()])
        values.mul_(shape[-1] ** -0.5)
        return values.add_(1.0) if name.endswith("norm") else values

    def check_all_read(self) -> None:
        """Nothing is in a file that might be left."""
