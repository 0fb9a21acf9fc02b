"""Norms, activation and RoPE of a stage: FlashInfer's kernels, and plain torch to compare with.

All arithmetic is float32; tensors are of the model's dtype, [rows, ...].
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Elementwise(Protocol):
    """Enqueues; what it returns is new memory."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """x: [rows, width] or [rows, heads, width]; weight: [width]."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: [rows, 2 width], the gate first; returns [rows, width]."""
        ...

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
    ) -> None:
        """RoPE in place. q, k: [rows, heads, head_dim], of two numbers of heads.

        positions: [rows] int64; cos_sin: [tokens, head_dim] float32, cosines first.
        """
        ...


class TorchElementwise:
    """The reference, on any device."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return (wide * scale * weight.float()).to(x.dtype)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
    ) -> None:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        for heads in (q, k):
            low, high = heads.float().chunk(2, dim=-1)
            heads.copy_(torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1))


class FlashInferElementwise:
    """A kernel for each, for 16-bit types. No GPU has run it yet."""

    def __init__(self) -> None:
        import flashinfer  # an extra: nothing else of the worker needs it

        self._flashinfer: Any = flashinfer

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        normed: torch.Tensor = self._flashinfer.rmsnorm(x, weight, epsilon)
        return normed

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._flashinfer.silu_and_mul(gate_up)
        return product

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
    ) -> None:
        self._flashinfer.apply_rope_with_cos_sin_cache_inplace(
            positions, q.flatten(1), k.flatten(1), q.shape[-1], cos_sin
        )
