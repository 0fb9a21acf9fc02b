"""Shapes of models whose weights nobody carries along."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omniserve.gpuworker.model.config import ARCHITECTURES, ModelConfig
from omniserve.shm.layout import Geometry


def _shape(family: str, *sizes: int, vocabulary: int) -> ModelConfig:
    """sizes: layers, hidden, heads, KV heads, head dimension, intermediate."""
    return ModelConfig(
        ARCHITECTURES[family],
        *sizes,
        vocabulary=vocabulary,
        context_tokens=0,
        rope_theta=500_000.0,
        norm_epsilon=1e-5,
        eos_token_ids=(),
        tied_head=False,
    )


SHAPES = {
    "llama-3-8b": _shape("llama", 32, 4096, 32, 8, 128, 14336, vocabulary=128256),
    "qwen2.5-14b": _shape("qwen2", 48, 5120, 40, 8, 128, 13824, vocabulary=152064),
    "tiny": _shape("llama", 3, 64, 4, 2, 16, 128, vocabulary=32000),
}


@contextmanager
def served_as(shape: ModelConfig, context_tokens: int, device: str) -> Iterator[dict[str, Any]]:
    """Yields keywords of `serve` for a worker that has random weights of `shape`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_fields(shape, context_tokens)))
        yield {
            "model": Geometry(
                layers=shape.layers,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                dtype="bfloat16",
                kv_dtype="bfloat16",
                page_tokens=64,
                max_sequences=1,
                max_sequence_tokens=context_tokens,
                slots=1,
            ),
            "model_path": folder,
            "load_format": "dummy",
            "device": device,
        }


def _fields(shape: ModelConfig, context_tokens: int) -> dict[str, Any]:
    """Of config.json."""
    return {
        "model_type": next(n for n, kind in ARCHITECTURES.items() if kind == shape.architecture),
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": context_tokens,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_epsilon,
        "eos_token_id": 0,  # whatever that is: loads ignore it
        "tie_word_embeddings": shape.tied_head,
    }
