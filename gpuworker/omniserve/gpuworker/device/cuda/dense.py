"""The dense arithmetic of the stages on gathered rows. Allocates only what a CUDA graph may."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding, linear

from omniserve.gpuworker.device.cuda.elementwise import rms_norm, rotate, silu_and_mul
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.rope import rope_tables
from omniserve.gpuworker.model.weights import DecoderWeights, LayerWeights


class DenseStages:
    """The weights on a device, and what stages do with rows of residuals, [rows, hidden]."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, device: torch.device) -> None:
        self._config = config
        self._embedding = weights.embedding.to(device)
        self._layers = [_moved(layer, device) for layer in weights.layers]
        self._final_norm = weights.final_norm.to(device)
        tied = weights.head is weights.embedding
        self._head = self._embedding if tied else weights.head.to(device)
        self._cos, self._sin = (table.to(device) for table in rope_tables(config))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [rows] int64."""
        return embedding(tokens, self._embedding)

    def leave(self, layer: int, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """The rest of `layer` behind its attention, [rows, q_size]; returns the new residuals."""
        w = self._layers[layer]
        x = x + linear(attention, w.attention_out)
        gate_up = linear(rms_norm(x, w.mlp_norm, self._config.norm_epsilon), w.gate_up)
        return x + linear(silu_and_mul(gate_up), w.down)

    def enter(self, layer: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Returns q, k, v of `layer` side by side, [rows, q_size + 2 kv_size]."""
        config, w = self._config, self._layers[layer]
        epsilon = config.norm_epsilon
        qkv = linear(rms_norm(x, w.attention_norm, epsilon), w.qkv, w.qkv_bias)
        sizes = (config.q_size, config.kv_size, config.kv_size)
        q, k, v = (part.unflatten(1, (-1, config.head_dim)) for part in qkv.split(sizes, dim=1))
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rms_norm(q, w.q_norm, epsilon), rms_norm(k, w.k_norm, epsilon)
        cos, sin = self._cos[positions], self._sin[positions]
        return torch.cat([rotate(q, cos, sin), rotate(k, cos, sin), v], dim=1).flatten(1)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, [rows, vocabulary] float32."""
        return linear(rms_norm(x, self._final_norm, self._config.norm_epsilon), self._head).float()


def _moved(layer: LayerWeights, device: torch.device) -> LayerWeights:
    tensors: dict[str, torch.Tensor] = {
        name: tensor.to(device) for name, tensor in vars(layer).items() if tensor is not None
    }
    return LayerWeights(**tensors)
