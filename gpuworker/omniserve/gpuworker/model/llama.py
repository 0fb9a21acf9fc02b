"""Weights of a Llama model in the form in which the stages use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.gguf_file import GgufModel


@dataclass(frozen=True)
class LayerWeights:
    """One transformer layer; matrices are [out, in]."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor  # [q_size + 2 kv_size, hidden]
    attention_out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor  # [2 intermediate, hidden]
    down: torch.Tensor
    qkv_bias: torch.Tensor | None = None  # [q_size + 2 kv_size]
    q_norm: torch.Tensor | None = None  # [head_dim]
    k_norm: torch.Tensor | None = None  # [head_dim]


@dataclass(frozen=True)
class LlamaWeights:
    """A whole model. `head` is the embedding itself if the model ties them."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: torch.Tensor


def load_llama(model: GgufModel, dtype: torch.dtype) -> LlamaWeights:
    """Loads all weights as `dtype`. Raises ModelFileError if a tensor is missing or misshapen."""
    config = model.config
    hidden, intermediate = config.hidden, config.intermediate

    def get(name: str, *shape: int) -> torch.Tensor:
        return model.tensor(name, *shape).to(dtype)

    def layer(index: int) -> LayerWeights:
        name = f"blk.{index}."
        q = get(name + "attn_q.weight", config.q_size, hidden)
        k = get(name + "attn_k.weight", config.kv_size, hidden)
        v = get(name + "attn_v.weight", config.kv_size, hidden)
        gate = get(name + "ffn_gate.weight", intermediate, hidden)
        up = get(name + "ffn_up.weight", intermediate, hidden)
        return LayerWeights(
            attention_norm=get(name + "attn_norm.weight", hidden),
            qkv=torch.cat(
                [
                    _rotate_halves(q, config.heads, config),
                    _rotate_halves(k, config.kv_heads, config),
                    v,
                ]
            ),
            attention_out=get(name + "attn_output.weight", hidden, config.q_size),
            mlp_norm=get(name + "ffn_norm.weight", hidden),
            gate_up=torch.cat([gate, up]),
            down=get(name + "ffn_down.weight", hidden, intermediate),
        )

    embedding = get("token_embd.weight", config.vocabulary, hidden)
    return LlamaWeights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.layers)),
        final_norm=get("output_norm.weight", hidden),
        head=get("output.weight", config.vocabulary, hidden)
        if model.has("output.weight")
        else embedding,
    )


def _rotate_halves(weight: torch.Tensor, heads: int, config: ModelConfig) -> torch.Tensor:
    """GGUF orders q and k rows for RoPE over neighbouring pairs; ours turns halves of a head."""
    pairs = weight.view(heads, config.head_dim // 2, 2, config.hidden)
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
