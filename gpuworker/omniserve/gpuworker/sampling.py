"""Sampling: the best token, or a draw that depends on the request and its position alone.

Steps and their order are vLLM's: penalties, temperature, min-p, top-k, top-p, draw. Rows that are
not greedy are taken one by one, in float64: a row fits the L2 cache where a batch does not, and
its arithmetic cannot depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from omniserve.gpuworker.requests import Request
from omniserve.gpuworker.sampling_params import SamplingParams

Row: TypeAlias = npt.NDArray[np.float64]
"""One value per token of the vocabulary."""

_BLOCK = 256
"""Tokens that a draw sums at a time."""
_WEIGHT_FLOORS = (1e-2, 1e-4, float(np.nextafter(0.0, 1.0)))
_LOGPROB_FLOORS = (-8.0, -16.0, -np.inf)
"""Where to look for the largest values of a row: the most probable tokens' are above the first."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before penalties and temperature."""

    logprob: float
    """Of the token that was taken."""
    top: tuple[tuple[int, float], ...]
    """(token, logprob) of the most probable ones, best first; of equals the lower id first."""


def uniform(seed: int, position: int) -> float:
    """Returns the draw in [0, 1) for the token at `position`.

    A counter-based generator: no state, so neither batch, process nor path can change a draw.
    """
    key = np.array([seed, position], dtype=np.uint64)  # a list of large ints would become floats
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def sample(
    best: npt.NDArray[np.int64], logits: torch.Tensor, requests: Sequence[Request]
) -> list[int]:
    """Returns the next token of each request.

    best: [requests], the tokens with the largest logits. logits: [requests, vocabulary] float32,
    looked at where more is needed; they stay as they are.
    """
    rows = logits.numpy()
    tokens: list[int] = best.tolist()
    for index, request in enumerate(requests):
        if not request.sampling.takes_best:
            tokens[index] = _choose(rows[index].astype(np.float64), request)
    return tokens


def logprobs(
    logits: torch.Tensor, requests: Sequence[Request], tokens: Sequence[int]
) -> dict[str, TokenLogprobs]:
    """Returns what there is to say of `tokens`, by id of those requests that asked for it.

    logits: [requests, vocabulary] float32, those that `sample` has chosen `tokens` from.
    """
    rows = logits.numpy()
    return {
        request.request_id: _logprobs(
            rows[index].astype(np.float64), tokens[index], request.sampling.logprobs
        )
        for index, request in enumerate(requests)
        if request.sampling.logprobs
    }


def _choose(row: Row, request: Request) -> int:
    """row: the logits, [vocabulary]; overwritten."""
    params = request.sampling
    _penalise(row, request)
    if params.temperature == 0.0:
        return int(row.argmax())
    row -= row.max()
    with np.errstate(over="ignore"):  # to -inf, which weighs nothing
        row /= params.temperature
    weights = np.exp(row, out=row)
    _drop_improbable(weights, params)
    return _draw(weights, uniform(params.seed, request.known))


def _draw(weights: Row, draw: float) -> int:
    """Returns the first token whose cumulative probability is over `draw`, in [0, 1).

    A running sum over a vocabulary takes longer than all else, so it runs over blocks of tokens,
    and then over those of one block.
    """
    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)))
    threshold = draw * blocks[-1]
    block = _first_over(blocks, threshold)
    first = block * _BLOCK
    before = blocks[block - 1] if block else 0.0
    inside = before + np.cumsum(weights[first : first + _BLOCK])
    return first + _first_over(inside, threshold)


def _first_over(cumulative: Row, threshold: float) -> int:
    """The first place over `threshold`; the last that adds anything if rounding leaves none."""
    last = np.searchsorted(cumulative, cumulative[-1])
    return int(min(np.searchsorted(cumulative, threshold, side="right"), last))


def _penalise(row: Row, request: Request) -> None:
    """Applies the penalties for tokens that were there before to logits, in place."""
    params = request.sampling
    if params.repetition_penalty not in (0.0, 1.0):
        seen = request.tokens[: request.known]
        found = row[seen]  # a token that is there twice is penalised once
        penalty = params.repetition_penalty
        row[seen] = np.where(found > 0.0, found / penalty, found * penalty)
    if params.presence_penalty or params.frequency_penalty:
        tokens, counts = np.unique(request.output, return_counts=True)
        row[tokens] -= params.frequency_penalty * counts + params.presence_penalty


def _drop_improbable(weights: Row, params: SamplingParams) -> None:
    """Zeroes what min-p, top-k and top-p leave out; of equal tokens all stay or none.

    weights: proportional to probabilities, the largest is 1.
    """
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0
    if 0 < params.top_k < len(weights):
        weights[weights < _kth_largest(weights, params.top_k, _WEIGHT_FLOORS)] = 0.0
    if 0.0 < params.top_p < 1.0:
        weights[weights < _nucleus_floor(weights, params.top_p)] = 0.0


def _kth_largest(row: Row, k: int, floors: Sequence[float]) -> float:
    """Looks among values above each of `floors` in turn: mostly few are, and few sort fast.

    Returns the least of those above the last one if they are fewer than `k`.
    """
    for floor in floors:
        candidates = row[row >= floor]
        if len(candidates) >= k:
            break
    place = max(0, len(candidates) - k)
    return float(np.partition(candidates, place)[place])


def _nucleus_floor(weights: Row, top_p: float) -> float:
    """The least of the largest weights that make up `top_p` of the sum of all."""
    wanted = top_p * weights.sum()
    for floor in _WEIGHT_FLOORS:
        candidates = weights[weights >= floor]
        if candidates.sum() >= wanted:
            break
    descending = np.sort(candidates)[::-1]
    # Rounding may leave even all of them short of what is wanted.
    place = min(np.searchsorted(np.cumsum(descending), wanted), len(descending) - 1)
    return float(descending[place])


def _logprobs(row: Row, token: int, top: int) -> TokenLogprobs:
    """row: the logits, [vocabulary]; overwritten."""
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    least = _kth_largest(row, min(top, len(row)), _LOGPROB_FLOORS)
    candidates = np.flatnonzero(row >= least)
    best = candidates[np.argsort(-row[candidates], kind="stable")][:top]
    return TokenLogprobs(float(row[token]), tuple((int(t), float(row[t])) for t in best))
