"""Shape of a Llama model, as the engine needs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Sizes are in elements. Stage `l` of `layers + 1` is the work between two attentions."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context_tokens: int
    rope_theta: float
    norm_epsilon: float
    eos_token_ids: tuple[int, ...]

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim
