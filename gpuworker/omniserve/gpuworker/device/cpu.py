"""The `cpu` back end: dense stages in torch, attention in the native kernel.

Called by the engine's loop only. Owns the weights and the device KV.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)

from omniserve.attnkernel import PagedKv
from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.rope import rope_tables
from omniserve.gpuworker.model.weights import DecoderWeights, LayerWeights

_KV_DTYPE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class CpuDevice:
    """Runs dense stages and local attention. Shapes: rows are tokens of any requests."""

    name = "cpu"

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        pages: int,
        page_tokens: int,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.config = config
        self.dtype = weights.embedding.dtype
        self._weights = weights
        self._cos, self._sin = rope_tables(config)
        self.kv = PagedKv(
            config.layers,
            config.kv_heads,
            config.head_dim,
            page_tokens,
            pages,
            _KV_DTYPE[self.dtype],
            threads,
        )

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [rows] int64. Returns the residual, [rows, hidden]."""
        return F.embedding(tokens, self._weights.embedding)

    def enter_layer(
        self, layer: int, residual: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Norm, QKV projection and RoPE of `layer`.

        residual: [rows, hidden]; positions: [rows] int64.
        Returns q, k and v side by side, [rows, q_size + 2 kv_size].
        """
        weights = self._weights.layers[layer]
        normed = self._norm(residual, weights.attention_norm)
        qkv = F.linear(normed, weights.qkv, weights.qkv_bias)
        self._norm_heads(qkv, weights)
        self._rotate(qkv, positions)
        return qkv

    def leave_layer(
        self, layer: int, residual: torch.Tensor, attention: torch.Tensor
    ) -> torch.Tensor:
        """Output projection, residual and MLP of `layer`.

        residual: [rows, hidden]; attention: [rows, q_size]. Returns the new residual.
        """
        weights = self._weights.layers[layer]
        residual = residual + F.linear(attention, weights.attention_out)
        gate_up = F.linear(self._norm(residual, weights.mlp_norm), weights.gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return residual + F.linear(F.silu(gate) * up, weights.down)

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """Final norm and LM head. residual: [rows, hidden]. Returns [rows, vocabulary] float32."""
        hidden = self._norm(residual, self._weights.final_norm)
        return F.linear(hidden, self._weights.head).float()

    def attend(self, layer: int, qkv: torch.Tensor, cohort: Cohort, out: torch.Tensor) -> None:
        """Appends k and v of a cohort's rows to the device KV, then attends, causally.

        qkv: [rows, q_size + 2 kv_size]; out: [rows, q_size], written.
        """
        q_end = self.config.q_size
        k_end = q_end + self.config.kv_size
        self.kv.append(layer, qkv[:, q_end:k_end], qkv[:, k_end:], cohort.pages, cohort.offsets)
        self.kv.attend(
            layer,
            qkv[:, :q_end],
            out,
            cohort.tables,
            cohort.first_row,
            cohort.n_rows,
            cohort.first_position,
            self.config.window_tokens(layer),
        )

    def _norm(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(values, (self.config.hidden,), weight, self.config.norm_epsilon)

    def _norm_heads(self, qkv: torch.Tensor, weights: LayerWeights) -> None:
        """RMS norm of each head of q and of k, in place, where the model has them."""
        if weights.q_norm is None or weights.k_norm is None:
            return
        config = self.config
        q = qkv[:, : config.q_size].view(len(qkv), -1, config.head_dim)
        k = qkv[:, config.q_size : config.q_size + config.kv_size].view(
            len(qkv), -1, config.head_dim
        )
        for heads, weight in ((q, weights.q_norm), (k, weights.k_norm)):
            heads.copy_(F.rms_norm(heads, (config.head_dim,), weight, config.norm_epsilon))

    def _rotate(self, qkv: torch.Tensor, positions: torch.Tensor) -> None:
        """Rotary embedding of q and k, in place, in float32."""
        config = self.config
        heads = qkv[:, : config.q_size + config.kv_size].view(
            qkv.shape[0], config.heads + config.kv_heads, 2, config.head_dim // 2
        )
        cos = self._cos[positions].unsqueeze(1)
        sin = self._sin[positions].unsqueeze(1)
        low, high = heads[:, :, 0].float(), heads[:, :, 1].float()
        turned = low * cos - high * sin  # `low` may be a view of what is written next
        heads[:, :, 1] = high * cos + low * sin
        heads[:, :, 0] = turned
