"""Rotary embedding: its tables, and how extended contexts change its frequencies."""

from __future__ import annotations

import math

import torch

from omniserve.gpuworker.model.config import ModelConfig


def rope_tables(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines and sines, each [context_tokens, head_dim / 2] float32.

    Frequency `i` turns elements `i` and `i + head_dim / 2` of a head.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inverse = 1.0 / (config.rope_theta**exponents)
    if config.rope_divisors:
        inverse = inverse / torch.tensor(config.rope_divisors, dtype=torch.float32)
    angles = torch.outer(torch.arange(config.context_tokens, dtype=torch.float32), inverse)
    return angles.cos(), angles.sin()


def llama3_divisors(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context_tokens: int,
) -> tuple[float, ...]:
    """Divisors of the RoPE frequencies as Llama 3.1 extends its context.

    Waves that fit the original context more than `high_freq_factor` times stay, those that fit it
    less than `low_freq_factor` times get `factor` times as long, with a smooth passage between.
    """
    divisors = []
    for element in range(0, head_dim, 2):
        fits = original_context_tokens * theta ** (-element / head_dim) / (2 * math.pi)
        kept = (fits - low_freq_factor) / (high_freq_factor - low_freq_factor)
        kept = min(1.0, max(0.0, kept))
        divisors.append(1.0 / ((1.0 - kept) / factor + kept))
    return tuple(divisors)
