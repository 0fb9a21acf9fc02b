"""Weights of a decoder model in the form in which the stages use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.dummy import DummyModel
from omniserve.gpuworker.model.gguf_file import GgufModel
from omniserve.gpuworker.model.hf_config import read_config
from omniserve.gpuworker.model.hf_folder import HfFolder


class WeightSource(Protocol):
    """A model file, whatever its format. All methods raise ModelFileError.

    Names are ours: `embedding`, `final_norm`, `head`, and within `layers.<index>.`:
    `attention_norm`, `q`, `k`, `v`, `q_bias`, `k_bias`, `v_bias`, `q_norm`, `k_norm`,
    `attention_out`, `mlp_norm`, `gate`, `up`, `down`. Matrices are [out, in]; rows of q and k are
    ordered for RoPE that turns halves of a head.
    """

    @property
    def config(self) -> ModelConfig: ...

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Reads one tensor and checks its shape."""
        ...

    def check_all_read(self) -> None:
        """A tensor that nobody asked for would be a part of the model that is not computed."""
        ...


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
class DecoderWeights:
    """A whole model. `head` is the embedding itself if the model ties them."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: torch.Tensor


def open_model(path: Path, load_format: str = "auto") -> WeightSource:
    """Opens a GGUF file or a Hugging Face folder; `dummy`: a folder's shape with random weights.

    Raises ModelFileError.
    """
    if load_format == "dummy":
        return DummyModel(read_config(path))
    return HfFolder(path) if path.is_dir() else GgufModel(path)


def load_weights(source: WeightSource, dtype: torch.dtype) -> DecoderWeights:
    """Loads all weights as `dtype`.

    Raises ModelFileError if a tensor is missing or misshapen, or belongs to no part that we know.
    """
    config = source.config
    hidden, intermediate, head_dim = config.hidden, config.intermediate, config.head_dim
    sizes = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}

    def get(name: str, *shape: int) -> torch.Tensor:
        return source.tensor(name, *shape).to(dtype)

    def layer(index: int) -> LayerWeights:
        name = f"layers.{index}."
        bias = q_norm = k_norm = None
        if config.architecture.qkv_bias:
            bias = torch.cat([get(f"{name}{part}_bias", size) for part, size in sizes.items()])
        if config.architecture.qk_norm:
            q_norm, k_norm = get(name + "q_norm", head_dim), get(name + "k_norm", head_dim)
        return LayerWeights(
            attention_norm=get(name + "attention_norm", hidden),
            qkv=torch.cat([get(name + part, size, hidden) for part, size in sizes.items()]),
            attention_out=get(name + "attention_out", hidden, config.q_size),
            mlp_norm=get(name + "mlp_norm", hidden),
            gate_up=torch.cat([get(name + part, intermediate, hidden) for part in ("gate", "up")]),
            down=get(name + "down", hidden, intermediate),
            qkv_bias=bias,
            q_norm=q_norm,
            k_norm=k_norm,
        )

    embedding = get("embedding", config.vocabulary, hidden)
    weights = DecoderWeights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.layers)),
        final_norm=get("final_norm", hidden),
        head=embedding if config.tied_head else get("head", config.vocabulary, hidden),
    )
    source.check_all_read()
    return weights
