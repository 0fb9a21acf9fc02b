"""Which kernels the back end runs, besides matrix products."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch

from omniserve.gpuworker.device.cuda.attention import (
    Attention,
    FlashInferAttention,
    TorchAttention,
)
from omniserve.gpuworker.device.cuda.elementwise import (
    Elementwise,
    FlashInferElementwise,
    TorchElementwise,
)
from omniserve.gpuworker.device.cuda.flashinfer_modules import compile_modules
from omniserve.gpuworker.model.config import ModelConfig


class Kernels(NamedTuple):
    attention: Attention
    elementwise: Elementwise

    @staticmethod
    def plain(config: ModelConfig) -> Kernels:
        """Plain torch: right on any device, and slow."""
        return Kernels(TorchAttention(config), TorchElementwise())

    @staticmethod
    def flashinfer(config: ModelConfig, page_tokens: int, dtype: torch.dtype) -> Kernels | None:
        """None where FlashInfer is not installed, or not made for `dtype`."""
        if dtype == torch.float32 or find_spec("flashinfer") is None:
            return None
        windows = {config.window_tokens(layer) > 0 for layer in range(config.layers)}
        compile_modules([(config.head_dim, window) for window in windows], dtype)
        attention = FlashInferAttention(config, page_tokens, dtype)
        return Kernels(attention, FlashInferElementwise())
