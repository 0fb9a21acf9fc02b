"""Shape of a decoder model, as the engine needs it; both kinds of model files are read into it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """In what the supported families differ from Llama."""

    qkv_bias: bool = False
    """A bias on the QKV projection."""
    qk_norm: bool = False
    """An RMS norm over each head of q and k, before RoPE."""


ARCHITECTURES = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(qkv_bias=True),
    "qwen3": Architecture(qk_norm=True),
}
"""By the name that model files use."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes are in elements. Stage `l` of `layers + 1` is the work between two attentions."""

    architecture: Architecture
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
    tied_head: bool
    """The LM head is the embedding."""
    rope_divisors: tuple[float, ...] = ()
    """Context extension: each of the head_dim / 2 RoPE frequencies is divided by its own."""
    windows_tokens: tuple[int, ...] = ()
    """Of each layer: tokens that a token sees at most, itself among them; 0 = all before it.
    Empty if no layer has a window."""

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def window_tokens(self, layer: int) -> int:
        """The window of `layer`; 0 if it has none."""
        return self.windows_tokens[layer] if self.windows_tokens else 0

    def flaw(self) -> str:
        """Says why no such model can be; empty if it can."""
        sizes = {
            "layers": self.layers,
            "hidden elements": self.hidden,
            "heads": self.heads,
            "KV heads": self.kv_heads,
            "elements of a head": self.head_dim,
            "intermediate elements": self.intermediate,
            "vocabulary tokens": self.vocabulary,
            "context tokens": self.context_tokens,
        }
        for what, size in sizes.items():
            if size < 1:
                return f"{size} {what}"
        if self.heads % self.kv_heads:
            return f"{self.kv_heads} KV heads do not divide {self.heads} heads"
        if self.head_dim % 2:
            return f"heads of {self.head_dim} elements have no halves for RoPE to turn"
        if self.rope_divisors and len(self.rope_divisors) != self.head_dim // 2:
            return f"{len(self.rope_divisors)} RoPE factors for {self.head_dim // 2} frequencies"
        if not all(divisor > 0 for divisor in self.rope_divisors):
            return "RoPE factors that are not positive"
        if not self.rope_theta > 0:
            return f"RoPE base {self.rope_theta}"
        return ""
