"""Sampling: greedy, or temperature with a draw that depends on (seed, position) alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from omniserve.gpuworker.requests import Request


def uniform(seed: int, position: int) -> float:
    """Returns the draw in [0, 1) for the token at `position`.

    A counter-based generator: no state, so neither batch, process nor path can change a draw.
    """
    key = np.array([seed, position], dtype=np.uint64)  # a list of large ints would become floats
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """Returns the next token of each request.

    logits: [requests, vocabulary] float32, row i for requests[i].
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for index, request in enumerate(requests):
        if request.temperature > 0.0:
            draw = uniform(request.seed, request.known)
            tokens[index] = _draw(logits[index], request.temperature, draw)
    return tokens


def _draw(logits: torch.Tensor, temperature: float, draw: float) -> int:
    """Inverse of the cumulative distribution at `draw`, in float64. logits: [vocabulary]."""
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    threshold = torch.tensor(draw, dtype=torch.float64) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, threshold, right=True))
    return min(index, logits.shape[0] - 1)
