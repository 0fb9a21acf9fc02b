"""Small models with random weights, as `transformers` saves them and as llama.cpp converts them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 512
CONTEXT_TOKENS = 256
EOS_TOKEN_ID = 2
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
"""q has 256 elements, more than a residual of 128: a head's size is no quotient of others."""
ORIGINAL_CONTEXT_TOKENS = 32
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT_TOKENS,
}
WINDOW_TOKENS = 24
_TYPES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


@dataclass(frozen=True)
class Kind:
    """One model to make: a family and what is particular about its config."""

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


KINDS = (
    Kind("llama", "llama"),
    Kind("llama-tied", "llama", {"tie_word_embeddings": True}),
    Kind("llama3-rope", "llama", {"rope_parameters": LLAMA3_ROPE}),
    Kind(
        "linear-rope",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    Kind("qwen2", "qwen2", {"head_dim": None, "hidden_size": HEADS * HEAD_DIM}),
    Kind(
        "qwen2-tied",
        "qwen2",
        {"head_dim": None, "hidden_size": HEADS * HEAD_DIM, "tie_word_embeddings": True},
    ),
    Kind("qwen3", "qwen3"),
    Kind("qwen3-tied", "qwen3", {"tie_word_embeddings": True}),
    Kind("mistral", "mistral", {"sliding_window": None}),
    Kind("mistral-window", "mistral", {"sliding_window": WINDOW_TOKENS}),
)


def make(kind: Kind, seed: int = 0) -> Any:
    """Returns a model of `transformers` whose norms and biases are as random as its matrices."""
    config_type, model_type = _TYPES[kind.family]
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "eos_token_id": EOS_TOKEN_ID,
    } | kind.options
    config = config_type(**{k: v for k, v in options.items() if k != "head_dim" or v is not None})
    model = model_type(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1.0 + 0.3 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise * 2.0 / weight.shape[1] ** 0.5)
    return model


def save_gguf(model: Any, path: Path) -> Path:
    """Writes `model` in float32 as llama.cpp's converter does."""
    config = model.config
    family = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(EOS_TOKEN_ID)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(HEAD_DIM)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    _add_rope(writer, config)
    for name, weight in _gguf_tensors(model, permuted=family == "llama").items():
        writer.add_tensor(name, weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "llama3":
        # As LlamaModel.generate_extra_tensors of llama.cpp's convert_hf_to_gguf.py.
        base, dim = rope["rope_theta"], HEAD_DIM
        frequencies = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        factors = []
        for frequency in frequencies:
            wavelength = 2 * torch.pi / frequency
            if wavelength < high:
                factors.append(1.0)
            elif wavelength > low:
                factors.append(rope["factor"])
            else:
                smooth = (
                    rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
                ) / (rope["high_freq_factor"] - rope["low_freq_factor"])
                factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        writer.add_tensor("rope_freqs.weight", torch.tensor(factors, dtype=torch.float32).numpy())


def _gguf_tensors(model: Any, *, permuted: bool) -> dict[str, torch.Tensor]:
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if permuted and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = weight.view(heads, 2, -1, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        stem, suffix = name.rsplit(".", 1)
        tensors[f"{names.get_name(stem)}.{suffix}"] = weight
    return tensors
