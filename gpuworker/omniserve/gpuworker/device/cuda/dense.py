"""The dense arithmetic of the stages on gathered rows. Allocates only what a CUDA graph may."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding, linear

from omniserve.gpuworker.device.cuda.elementwise import Elementwise
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.rope import rope_tables
from omniserve.gpuworker.model.weights import DecoderWeights, LayerWeights


class DenseStages:
    """The weights on a device, and what stages do with rows of residuals, [rows, hidden]."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        elementwise: Elementwise,
        device: torch.device,
    ) -> None:
        self._config = config
        self._elementwise = elementwise
        self._embedding = weights.embedding.to(device)
        self._layers = [_moved(layer, device) for layer in weights.layers]
        self._final_norm = weights.final_norm.to(device)
        tied = weights.head is weights.embedding
        self._head = self._embedding if tied else weights.head.to(device)
        self._cos_sin = torch.cat(rope_tables(config), dim=1).to(device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [rows] int64."""
        return embedding(tokens, self._embedding)

    def leave(self, layer: int, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """The rest of `layer` behind its attention, [rows, q_size]; returns the new residuals."""
        w = self._layers[layer]
        x = torch.addmm(x, attention, w.attention_out.T)
        normed = self._elementwise.rms_norm(x, w.mlp_norm, self._config.norm_epsilon)
        product = self._elementwise.silu_and_mul(linear(normed, w.gate_up))
        return torch.addmm(x, product, w.down.T)

    def enter(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Writes q, k, v of `layer` side by side, [rows, q_size + 2 kv_size], into `out`."""
        config, w = self._config, self._layers[layer]
        epsilon, head_dim = config.norm_epsilon, config.head_dim
        normed = self._elementwise.rms_norm(x, w.attention_norm, epsilon)
        if w.qkv_bias is None:
            torch.mm(normed, w.qkv.T, out=out)
        else:
            torch.addmm(w.qkv_bias, normed, w.qkv.T, out=out)
        k_end = config.q_size + config.kv_size
        q = out[:, : config.q_size].unflatten(1, (-1, head_dim))
        k = out[:, config.q_size : k_end].unflatten(1, (-1, head_dim))
        if w.q_norm is not None and w.k_norm is not None:
            q.copy_(self._elementwise.rms_norm(q, w.q_norm, epsilon))
            k.copy_(self._elementwise.rms_norm(k, w.k_norm, epsilon))
        self._elementwise.rotate(q, k, positions, self._cos_sin)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, [rows, vocabulary]."""
        epsilon = self._config.norm_epsilon
        return linear(self._elementwise.rms_norm(x, self._final_norm, epsilon), self._head)


def _moved(layer: LayerWeights, device: torch.device) -> LayerWeights:
    tensors: dict[str, torch.Tensor] = {
        name: tensor.to(device) for name, tensor in vars(layer).items() if tensor is not None
    }
    return LayerWeights(**tensors)
